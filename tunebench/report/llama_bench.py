"""Rows of llama-bench's own output (`-o json`, `jsonl`, `csv` or `md`) as ours."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tunebench import results, stored
from tunebench.errors import TuneBenchError, one_line
from tunebench.results import Result, Setting
from tunebench.spec import Amount, EngineName, Size, Sizes, Test, Words

FILE_BYTES = 64 << 20
HINT = "Name a file that llama-bench wrote with -o jsonl, json, csv or md."
SHORT = {  # of the columns of a Markdown table
    "backend": "backends",
    "threads": "n_threads",
    "ngl": "n_gpu_layers",
    "sm": "split_mode",
    "nkvo": "no_kv_offload",
    "fa": "flash_attn",
    "lm": "load_mode",
    "mmap": "use_mmap",
    "dio": "use_direct_io",
    "embd": "embeddings",
    "nopo": "no_op_offload",
    "noh": "no_host",
    "rpk": "repack",
    "dev": "devices",
    "ts": "tensor_split",
    "ot": "tensor_buft_overrides",
    "fitt": "fit_target",
    "fitc": "fit_min_ctx",
}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
MEASURED = ("build_number", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts")
"""What is no setting: it may differ from run to run of the same case."""


class _Row(Struct):
    """What a row of llama-bench has a place for in ours, under its names. Whatever else it has is a setting."""

    n_prompt: Amount
    n_gen: Amount
    n_threads: Amount
    samples_ns: Sizes | None = None  # JSON alone has them
    samples_ts: list[float] = []  # the same as rates
    avg_ns: Size | None = None
    n_depth: Amount = 0
    model_type: Words = ""  # e.g. `llama 7B Q4_0`
    model_filename: Words = ""
    model_size: Amount = 0
    model_n_params: Amount = 0
    gpu_info: Words = ""
    cpu_info: Words = ""
    n_gpu_layers: int = 0  # -1 in newer versions: all
    backends: Words = "unknown"
    test_time: Words = ""
    type_k: Words = ""
    type_v: Words = ""
    build_commit: Words = ""


Fields = Mapping[str, Any]


def read(path: Path, model: str = "") -> list[Result]:
    """The rows of a file, under the name `model` if given; a TuneBenchError where it is none of llama-bench's."""
    text = _text(path)
    rows: list[tuple[_Row, Fields]] = []
    found: list[Result] = []
    number = 1
    try:
        for fields in _fields(text):
            stored.check(fields)
            rows.append((msgspec.convert(fields, _Row, strict="samples_ns" in fields), fields))
            number += 1
        files = Counter(_stem(name) for name in {row.model_filename for row, _ in rows})
        number = 1
        for row, fields in rows:
            found.append(_result(row, fields, model, named=files[_stem(row.model_filename)] > 1))
            results.check(found[-1])
            number += 1
    except (ValueError, csv.Error) as error:
        what = one_line(str(error), 200)
        raise TuneBenchError(f"{path}, row {number} is none of llama-bench's ({what}).", HINT) from None
    if not found:
        raise TuneBenchError(f"{path} holds no row of llama-bench.", HINT)
    return found


def _text(path: Path) -> str:
    """A file's text in UTF-8 or UTF-16, with a mark of its order or without."""
    try:
        data = stored.read_bytes(path, FILE_BYTES)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        if data[:64].count(0) > len(data[:64]) // 3:
            return data.decode("utf-16-be" if not data[0] else "utf-16-le")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", HINT) from None
    except ValueError as error:
        raise TuneBenchError(f"{path} is no text ({error}).", HINT) from None


def _fields(text: str) -> Iterator[Fields]:
    """The fields of each row by llama-bench's names, whatever lines of a log stand between them."""
    if re.search(r'\{\s*"', text):
        return _json_rows(text)
    return _csv_rows(text) if re.search(r'^"?build_commit"?,', text, re.MULTILINE) else _table_rows(text)


def _json_rows(text: str) -> Iterator[Fields]:
    decoder = json.JSONDecoder()
    at = 0
    while start := re.compile(r'\{\s*"').search(text, at):
        try:
            fields, at = decoder.raw_decode(text, start.start())
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        yield fields


def _csv_rows(text: str) -> Iterator[Fields]:
    names: list[str] = []
    for line in text.splitlines():
        cells = next(csv.reader([line]), [])
        if cells[:1] == ["build_commit"]:
            names = cells
        elif names and len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        elif names and line.startswith('"'):
            raise ValueError(f"{len(cells)} fields, and the first line has {len(names)}")


def _table_rows(text: str) -> Iterator[Fields]:
    """Of Markdown: rates that were rounded, and of the model its description alone."""
    build = re.search(r"^build: (\w{1,64}) \((\d{1,9})\)", text, re.MULTILINE)
    common = {"build_commit": build[1], "build_number": build[2]} if build else {}
    names: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|") or re.fullmatch(r"[\s|:-]*", line):
            continue
        if {"model", "test", "t/s"} <= set(cells):
            names = [SHORT.get(cell, cell) for cell in cells]
        elif names and len(cells) != len(names):
            raise ValueError(f"{len(cells)} cells, and the table has {len(names)} columns")
        elif names:
            yield {**common, **_table_row(dict(zip(names, cells, strict=True)))}


def _table_row(cells: dict[str, str]) -> dict[str, Any]:
    test = re.fullmatch(r"(?:pp ?(\d{1,9}))?\+?(?:tg ?(\d{1,9}))?(?: @ d(\d{1,9}))?", cells.pop("test"))
    rate = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)(?:\s*\S{1,3}\s*(\d[\d.]{0,20}))?", cells.pop("t/s"))
    if not test or not rate or not float(rate[1]):
        raise ValueError("no test and its t/s")
    n_prompt, n_gen, n_depth = (int(number or 0) for number in test.groups())
    return {
        "n_threads": 0,
        "model_type": cells.pop("model"),
        "model_size": _scaled(cells.pop("size", "")),
        "model_n_params": _scaled(cells.pop("params", "")),
        **cells,
        **{"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": n_depth},
        **{"avg_ns": round((n_prompt + n_gen) * 1e9 / float(rate[1])), "avg_ts": rate[1], "stddev_ts": rate[2] or "0"},
    }


def _scaled(words: str) -> int:
    """`3.56 GiB` or `6.74 B` -> 3822520893, 6740000000; 0 where it is neither."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) (\w+)", words)
    return round(float(match[1]) * UNITS.get(match[2], 0)) if match else 0


def _result(row: _Row, fields: Fields, model: str, named: bool) -> Result:
    """One of ours; `named` where another model's file has the same name in another folder."""
    test = Test(row.n_prompt, row.n_gen, row.n_depth)
    samples = [row.avg_ns] if row.samples_ns is None and row.avg_ns else row.samples_ns or []
    known = {name for name in _Row.__struct_fields__ if name not in ("n_gpu_layers", "type_v")} | set(MEASURED)
    settings = {name: _setting(value) for name, value in fields.items() if name not in known}
    more = {name: fields[name] for name in (*MEASURED, "backends", "model_filename", "cpu_info") if name in fields}
    return Result(
        model=model or _stem(row.model_filename) or row.model_type.removesuffix(scheme_of(row.model_type)).strip(),
        scheme=scheme_of(row.model_type) or "unknown",
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
        status="ok" if samples else "failed",
        reason="" if samples else "llama-bench kept no samples",
        test_time=row.test_time,
        settings={**settings, **({"model_filename": row.model_filename} if named else {})},
        samples_ns=samples,
        model_type=row.model_type,
        model_size=row.model_size,
        model_n_params=row.model_n_params,
        type_k=row.type_k,
        type_v=row.type_v,
        environment={"versions": {"llama_cpp": row.build_commit}, "llama_bench": more},
    )


def scheme_of(model_type: str) -> str:
    """What follows architecture and size: `llama 7B Q3_K - Small` -> `Q3_K - Small`; empty where nothing does."""
    words = re.sub(r"\b(mostly )|\(guessed\)", "", model_type).strip()
    match = re.fullmatch(r"\S+\s+\S+(?: \([A-Z][a-z]+\))?\s+(\S.*)", words)
    return match[1] if match else ""


def _stem(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].removesuffix(".gguf")


def _setting(value: object) -> Setting:
    """The same for all formats: CSV has 0 where JSON has false."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value, re.ASCII) else value
    return value if isinstance(value, int | float | None) else json.dumps(value, sort_keys=True)
