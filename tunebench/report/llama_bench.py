"""Rows of llama-bench's own JSON (`-o json`) or JSONL (`-o jsonl`) as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunebench.errors import TuneBenchError
from tunebench.results import Result
from tunebench.spec import Test

NEEDED = ("n_prompt", "n_gen", "samples_ns", "n_threads")


def read(path: Path, model: str = "") -> list[Result]:
    """The rows of a file, under the name `model` if given; a TuneBenchError where it is none of llama-bench's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", "Name a file that llama-bench wrote.") from None
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s]
    except json.JSONDecodeError as error:
        raise TuneBenchError(f"{path} is neither JSON nor JSONL ({error}).", "Use llama-bench -o jsonl.") from None
    return [_row(data, f"{path}, row {number}", model) for number, data in enumerate(found, 1)]


def _row(data: dict[str, Any], where: str, model: str) -> Result:
    missing = [name for name in NEEDED if not isinstance(data, dict) or name not in data]
    if missing:
        raise TuneBenchError(f"{where} is none of llama-bench's: no {', '.join(missing)}.", "Use llama-bench -o jsonl.")
    test = Test(int(data["n_prompt"]), int(data["n_gen"]), int(data.get("n_depth", 0)))
    described = str(data.get("model_type", ""))  # e.g. `llama 7B Q4_0`
    on_gpu = bool(data.get("gpu_info")) and int(data.get("n_gpu_layers", 0)) != 0
    device = str((data["gpu_info"] if on_gpu else data.get("cpu_info")) or "unknown")
    return Result(
        model=model or Path(str(data.get("model_filename", "unknown"))).stem,
        scheme=described.partition(" (")[0].split(" ")[-1] or "unknown",
        schedule="library",
        engine="llama_cpp",
        target=str(data.get("backends", "unknown")).lower(),
        device=device,
        test=test.name,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        batch=1,
        n_threads=int(data["n_threads"]),
        status="ok" if data["samples_ns"] else "failed",
        reason="" if data["samples_ns"] else "llama-bench kept no samples",
        test_time=str(data.get("test_time", "")),
        samples_ns=[int(sample) for sample in data["samples_ns"]],
        model_type=described,
        model_size=int(data.get("model_size", 0)),
        model_n_params=int(data.get("model_n_params", 0)),
        type_k=str(data.get("type_k", "")),
        type_v=str(data.get("type_v", "")),
        environment={"versions": {"llama_cpp": str(data.get("build_commit", ""))}},
    )
