"""Rows of llama-bench's own JSON (`-o json`) or JSONL (`-o jsonl`) as ours."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from tunebench.errors import TuneBenchError
from tunebench.results import Result
from tunebench.spec import Amount, EngineName, Size, Test


class _Row(Struct):
    """What is used of a row of llama-bench, under its names."""

    n_prompt: Amount
    n_gen: Amount
    samples_ns: list[Size]
    n_threads: Amount
    n_depth: Amount = 0
    model_type: str = ""  # e.g. `llama 7B Q4_0`
    model_filename: str = "unknown"
    model_size: Amount = 0
    model_n_params: Amount = 0
    gpu_info: str = ""
    cpu_info: str = ""
    n_gpu_layers: int = 0  # -1 in newer versions: all
    backends: str = "unknown"
    test_time: str = ""
    type_k: str = ""
    type_v: str = ""
    build_commit: str = ""


def read(path: Path, model: str = "") -> list[Result]:
    """The rows of a file, under the name `model` if given; a TuneBenchError where it is none of llama-bench's."""
    try:
        data = path.read_bytes().strip()
        lines = msgspec.json.decode(data, type=list[msgspec.Raw]) if data.startswith(b"[") else data.splitlines()
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", "Name a file that llama-bench wrote.") from None
    except ValueError as error:
        raise TuneBenchError(f"{path} is neither JSON nor JSONL ({error}).", "Use llama-bench -o jsonl.") from None
    rows = [_decode(line, f"{path}, row {number}") for number, line in enumerate(filter(None, lines), 1)]
    return [_result(row, model) for row in rows]


def _decode(line: bytes | msgspec.Raw, where: str) -> _Row:
    try:
        return msgspec.json.decode(line, type=_Row)
    except ValueError as error:
        raise TuneBenchError(f"{where} is none of llama-bench's ({error}).", "Use llama-bench -o jsonl.") from None


def _result(row: _Row, model: str) -> Result:
    test = Test(row.n_prompt, row.n_gen, row.n_depth)
    return Result(
        model=model or Path(row.model_filename).stem,
        scheme=row.model_type.partition(" (")[0].split(" ")[-1] or "unknown",
        schedule="library",
        engine=EngineName.LLAMA_CPP,
        target=row.backends.lower(),
        device=(row.gpu_info if row.gpu_info and row.n_gpu_layers else row.cpu_info) or "unknown",
        test=test.name,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        batch=1,
        n_threads=row.n_threads,
        status="ok" if row.samples_ns else "failed",
        reason="" if row.samples_ns else "llama-bench kept no samples",
        test_time=row.test_time,
        samples_ns=row.samples_ns,
        model_type=row.model_type,
        model_size=row.model_size,
        model_n_params=row.model_n_params,
        type_k=row.type_k,
        type_v=row.type_v,
        environment={"versions": {"llama_cpp": row.build_commit}},
    )
