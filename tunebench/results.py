"""Result rows: one JSON line each, appended as soon as it exists; the only bridge to the report.

Schema history
  1  first version. `kind` is "case" (a benched combination) or "tune" (what one tuning run did).
     llama-bench's fields have the same names and meanings here; those that only llama.cpp has (cpu_mask,
     n_gpu_layers, tensor_split, ...) are left out. What `_for_llama_bench` adds is for its readers alone:
     raw samples are stored, and statistics are ignored when a row is read back.
     Of a tuning run over RPC `environment` has `rpc` (the devices, their times in the probe, which were lost), and
     `cost_s` has `queue`, the wait for a device.
  2  a kernel's `bucket` is called `chunk`.
  3  `model_id`, `run_name`, `settings`, `joules_per_token`, `conditions`, `throttled` and `began_from` are new; a
     kernel's decision may be "not searched" or "nothing to decide", which were "kept default".
  4  `quality`, `weights`, `layers` and `active_n_params` are new.
"""

import datetime
import os
import re
import statistics
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from msgspec import Meta, Struct

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from tunebench import durable, stored
from tunebench.errors import StorageError, TuneBenchError, one_line
from tunebench.spec import Amount, Amounts, Count, Figure, Kernel, Schedule, Size, Sizes, Words

SCHEMA_VERSION = 4
LINE_BYTES, FILE_BYTES = 16 << 20, 64 << 20  # larger ones are nobody's results
MOST_WARNINGS = 20  # of a file
ROW_START = re.compile(rb'(?=\{"model":)')  # of a line that `append` wrote
Setting = str | int | float | bool | None
Kernels = Annotated[list[Kernel], Meta(max_length=10_000)]
Course = Annotated[list[dict[str, Figure]], Meta(max_length=100_000)]
Correlation = Annotated[float, Meta(ge=-1.01, le=1.01)]
Status = Literal["ok", "failed", "not_run"]


class Quality(Struct, frozen=True):
    """How a model in a scheme predicts a text, beside the same model in float32; intervals of 99 %."""

    text: Words  # which, and a hash of it
    tokens: Size  # predicted
    perplexity: Figure
    reference_perplexity: Figure  # of the float model
    kl: Figure  # mean divergence from the float model's distributions, nats a token
    same_top: Annotated[float, Meta(ge=0, le=1)]  # share of tokens whose most likely one is the float model's
    decode_perplexity: Figure | None = None  # of a part of the text, a token at a time; None: not measured
    decode_prefill_perplexity: Figure | None = None  # of that part by prompt chunks
    perplexity_interval: Annotated[list[Figure], Meta(max_length=2)] = []
    kl_interval: Annotated[list[Figure], Meta(max_length=2)] = []
    same_top_interval: Annotated[list[Figure], Meta(max_length=2)] = []


class Result(Struct, frozen=True, tag_field="kind", tag="case"):
    """One benched case. Times in nanoseconds of one whole test, memory in bytes, rates in base units."""

    model: Words
    scheme: Words
    schedule: Schedule
    engine: Words  # an EngineName, or what another program's rows say
    target: Words
    device: Words
    test: Words
    n_prompt: Amount
    n_gen: Amount
    n_depth: Amount
    batch: Size
    n_threads: Amount
    status: Status
    reason: Words = ""  # why it is not ok
    run_id: Words = ""  # rows of one run were interleaved on one machine and may be compared
    run_name: Words = ""  # as its user named the run; empty: it is named by its start
    test_time: Words = ""  # ISO 8601, start of the case, UTC
    model_id: Words = ""  # 12 hex digits of a hash of what the model computes; empty: unknown
    settings: dict[str, Setting] = {}  # what else makes it another case, such as llama-bench's n_ubatch or flash_attn
    samples_ns: Sizes = []
    warmup_ns: Sizes = []
    model_type: Words = ""  # as llama-bench: a description
    model_size: Amount = 0  # bytes of weights
    model_n_params: Amount = 0
    active_n_params: Amount = 0  # of those, what one token multiplies; 0: all of them
    layers: Amount = 0  # how many were run, where that was fewer than the model has
    weights: Literal["", "random", "real"] = ""  # empty: unknown
    quality: Quality | None = None
    type_k: Words = ""  # as llama-bench: the cache's type, f16, bf16 or f32
    type_v: Words = ""
    chunks: Sizes = []  # lengths that prompts were cut into
    flops_per_token: Amount = 0  # multiply-adds count as two, matrix products only
    bytes_per_token: Amount = 0  # weights + KV cache read for one decoded token at the test's mean depth, one step
    multiplies: Words = "float32"  # what matrix products multiply: float32, float16, bfloat16 or int8
    memory: dict[str, Count] = {}  # weights, kv_cache, planned, peak
    coverage: Figure | None = None  # share of the phase's time under tuned kernels
    kernels: Kernels = []
    probe: dict[str, Figure] = {}  # read_bytes_per_s, flops_per_s, int8_ops_per_s, of this run
    noise: Figure | None = None  # largest effect, as a ratio - 1, that an A/A comparison in this run still allows
    joules_per_token: Figure | None = None  # of the device while the samples were taken; None: there is no counter
    conditions: dict[str, Any] = {}  # clocks, temperature, throttle reasons at `start` and `end` of the case
    throttled: Amounts = []  # places in `samples_ns` of those taken while the device was throttled
    environment: dict[str, Any] = {}
    schema_version: int = SCHEMA_VERSION


class TuneResult(Struct, frozen=True, tag_field="kind", tag="tune"):
    """What one tuning run did: its cost, its course and its decisions."""

    model: Words
    scheme: Words
    target: Words
    device: Words
    batch: Size
    n_threads: Amount
    run_id: Words = ""
    run_name: Words = ""
    test_time: Words = ""
    model_id: Words = ""
    began_from: Words = ""  # the databases whose winners were there to be tried first, its own among them
    trials: Amount = 0  # measured in this run
    valid_trials: Amount = 0  # of those, built, correct and timed
    cost_s: dict[str, Figure] = {}  # search, build, run, model, verify, total, queue if any
    curve: Course = []  # wall_s, trials, prefill_ns, decode_ns (estimates)
    kernels: Kernels = []
    noise: Figure | None = None  # as a Result's, of the kernels
    ranking: dict[str, Correlation] = {}  # rank correlation of the cost model's scores, by task
    environment: dict[str, Any] = {}
    schema_version: int = SCHEMA_VERSION


class _Version(Struct):
    """What is read of a row before anything else."""

    schema_version: Size


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def append(path: Path, *rows: Result | TuneResult) -> None:
    """Write rows at the end of `path`, all or none, after a newline if the last line was torn.

    Several processes may do so at a time. A TuneBenchError where the disk is full, or the file cannot be written.
    """
    data = b"".join(map(_line, rows))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0, opener=_open) as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            _write(file, data)
    except OSError as error:
        raise _not_written(path, len(rows), error) from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | durable.HERE, 0o666)


def check(row: Result | TuneResult) -> None:
    """Raise a ValueError for a row that `read` would leave out."""
    _decode(_line(row))


def _line(row: Result | TuneResult) -> bytes:
    tag = {"kind": row.__struct_config__.tag}
    return stored.encode({**msgspec.structs.asdict(row), **tag, **_for_llama_bench(row)}) + b"\n"


def _write(file: FileIO, data: bytes) -> None:
    """At the end, to the disk; whatever fails leaves the file as it was."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        data = data if file.read(1) == b"\n" else b"\n" + data
    try:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(end)
        raise


def _not_written(path: Path, count: int, error: OSError) -> TuneBenchError:
    if error.errno in durable.FULL:
        what = (
            f"no space left on {path.parent}; nothing was lost of what {path.name} held, and {count} row(s) not added"
        )
        return StorageError(f"{what}.", "Make room, and run the same command again.")
    return TuneBenchError(f"cannot write to {path} ({error.strerror}).", "Name a folder with --work-dir.")


def read(path: Path) -> tuple[list[Result | TuneResult], list[str]]:
    """The rows of `path`, and a warning for each line that could not be used; a TuneBenchError where none is readable.

    Lines that lost the newline between them are told apart.
    """
    if not path.is_file():
        raise TuneBenchError(f"no results at {path}.", "Run `tunebench bench` first, or name a results.jsonl.")
    rows: list[Result | TuneResult] = []
    bad: list[str] = []
    try:
        if path.stat().st_size > FILE_BYTES:
            raise TuneBenchError(f"{path} is larger than {FILE_BYTES >> 20} MiB.", "Name a results.jsonl.")
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                for found in _rows(line) if line else []:
                    if isinstance(found, ValueError):
                        bad.append(f"{path}:{number}: left out, not a result row ({one_line(str(found), 200)})")
                    else:
                        rows.append(found)
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error.strerror}).", "Name a results.jsonl.") from None
    more = [f"{path}: {len(bad) - MOST_WARNINGS} more lines left out"] if len(bad) > MOST_WARNINGS else []
    return rows, bad[:MOST_WARNINGS] + more


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines; of one that is too long only its beginning, which is no row."""
    while line := file.readline(LINE_BYTES):
        yield line.strip()
        while len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)


def _rows(line: bytes) -> list[Result | TuneResult | ValueError]:
    """The row in a line, or what is wrong; where that is several rows, or a torn one and others, that of each."""
    whole = _try(line)
    parts = [part for part in ROW_START.split(line) if part]
    return [_try(part) for part in parts] if isinstance(whole, ValueError) and len(parts) > 1 else [whole]


def _try(line: bytes) -> Result | TuneResult | ValueError:
    try:
        return _decode(line)
    except ValueError as error:
        return error


def _decode(line: bytes) -> Result | TuneResult:
    """A row; a ValueError says what does not fit. Fields that only a newer writer knows are left out."""
    try:
        version = msgspec.json.decode(line, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise ValueError(f"schema {version} is newer than {SCHEMA_VERSION}: upgrade TuneBench")
        if version == 1:
            line = line.replace(b'"bucket":', b'"chunk":')  # only keys: in a string its quotes are escaped
        row = msgspec.json.decode(line, type=Result | TuneResult)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    stored.check(row.environment)
    if isinstance(row, Result):
        _check(row)
    return row


def _check(row: Result) -> None:
    """Raise a ValueError where fields do not fit to each other."""
    stored.check(row.conditions)
    stored.check(row.settings)
    if row.status == "ok" and not (row.samples_ns or row.quality):
        raise ValueError("status is ok, and there are no samples")
    if row.samples_ns and not row.n_prompt + row.n_gen:
        raise ValueError("there are samples, and n_prompt and n_gen are 0")
    if any(place >= len(row.samples_ns) for place in row.throttled):
        raise ValueError("throttled names a sample that is not there")


def tokens_per_s(row: Result) -> list[float]:
    """Throughput of each sample, all sequences of the batch together."""
    tokens = (row.n_prompt + row.n_gen) * row.batch
    return [tokens * 1e9 / sample for sample in row.samples_ns]


def _for_llama_bench(row: Result | TuneResult) -> dict[str, Any]:
    if not isinstance(row, Result):
        return {}
    described = {
        "build_commit": (row.environment.get("git") or {}).get("commit", ""),
        "cpu_info": row.device,
        "backends": f"{row.engine} {row.target}",
        "model_filename": row.model,
        "n_batch": max(row.chunks, default=0),
        "n_ubatch": max(row.chunks, default=0),
    }
    return {**described, **_statistics(row)} if row.samples_ns else described


def _statistics(row: Result) -> dict[str, Any]:
    rates = tokens_per_s(row)
    return {
        "avg_ns": round(statistics.fmean(row.samples_ns)),
        "stddev_ns": round(_stdev(row.samples_ns)),
        "samples_ts": rates,
        "avg_ts": statistics.fmean(rates),
        "stddev_ts": _stdev(rates),
    }


def _stdev(values: Iterable[float]) -> float:
    data = list(values)
    return statistics.stdev(data) if len(data) > 1 else 0.0
