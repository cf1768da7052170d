"""Result rows: one JSON line each, appended as soon as it exists; the only bridge to the report.

Schema history
  1  first version. `kind` is "case" (a benched combination) or "tune" (what one tuning run did).
     llama-bench's fields have the same names and meanings here; those that only llama.cpp has (cpu_mask,
     n_gpu_layers, tensor_split, ...) are left out. What `_for_llama_bench` adds is for its readers alone:
     raw samples are stored, and statistics are ignored when a row is read back.
     Of a tuning run over RPC `environment` has `rpc` (the devices, their times in the probe, which were lost), and
     `cost_s` has `queue`, the wait for a device.
  2  a kernel's `bucket` is called `chunk`.
  3  `model_id`, `run_name`, `settings`, `joules_per_token`, `conditions` and `throttled` are new; a kernel's decision
     may be "not searched" or "nothing to decide", which were "kept default".
"""

import datetime
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from tunebench import stored
from tunebench.errors import TuneBenchError
from tunebench.spec import Amount, Count, Kernel, Schedule, Size

SCHEMA_VERSION = 3
Setting = str | int | float | bool | None
Status = Literal["ok", "failed", "not_run"]


class Result(Struct, frozen=True, tag_field="kind", tag="case"):
    """One benched case. Times in nanoseconds of one whole test, memory in bytes, rates in base units."""

    model: str
    scheme: str
    schedule: Schedule
    engine: str  # an EngineName, or what another program's rows say
    target: str
    device: str
    test: str
    n_prompt: Amount
    n_gen: Amount
    n_depth: Amount
    batch: Size
    n_threads: Amount
    status: Status
    reason: str = ""  # why it is not ok
    run_id: str = ""  # rows of one run were interleaved on one machine and may be compared
    run_name: str = ""  # as its user named the run; empty: it is named by its start
    test_time: str = ""  # ISO 8601, start of the case, UTC
    model_id: str = ""  # 12 hex digits of a hash of what the model computes; empty: unknown
    settings: dict[str, Setting] = {}  # what else makes it another case, such as llama-bench's n_ubatch or flash_attn
    samples_ns: list[Size] = []
    warmup_ns: list[Size] = []
    model_type: str = ""  # as llama-bench: a description
    model_size: Amount = 0  # bytes of weights
    model_n_params: Amount = 0
    type_k: str = ""  # as llama-bench: the cache's type, f16, bf16 or f32
    type_v: str = ""
    chunks: list[Size] = []  # lengths that prompts were cut into
    flops_per_token: Amount = 0  # multiply-adds count as two, matrix products only
    bytes_per_token: Amount = 0  # weights + KV cache read for one decoded token at the test's mean depth, one step
    multiplies: str = "float32"  # what matrix products multiply: float32, float16, bfloat16 or int8
    memory: dict[str, Count] = {}  # weights, kv_cache, planned, peak
    coverage: Annotated[float, Meta(ge=0)] | None = None  # share of the phase's time under tuned kernels
    kernels: list[Kernel] = []
    probe: dict[str, float] = {}  # read_bytes_per_s, flops_per_s, int8_ops_per_s, of this run
    noise: float | None = None  # largest effect, as a ratio - 1, that an A/A comparison in this run still allows
    joules_per_token: float | None = None  # of the device while the samples were taken; None: there is no counter
    conditions: dict[str, Any] = {}  # clocks, temperature, throttle reasons at `start` and `end` of the case
    throttled: list[Amount] = []  # places in `samples_ns` of those taken while the device was throttled
    environment: dict[str, Any] = {}
    schema_version: int = SCHEMA_VERSION


class TuneResult(Struct, frozen=True, tag_field="kind", tag="tune"):
    """What one tuning run did: its cost, its course and its decisions."""

    model: str
    scheme: str
    target: str
    device: str
    batch: Size
    n_threads: Amount
    run_id: str = ""
    run_name: str = ""
    test_time: str = ""
    model_id: str = ""
    trials: Amount = 0  # measured in this run
    valid_trials: Amount = 0  # of those, built, correct and timed
    cost_s: dict[str, float] = {}  # search, build, run, model, verify, total, queue if any
    curve: list[dict[str, float]] = []  # wall_s, trials, prefill_ns, decode_ns (estimates)
    kernels: list[Kernel] = []
    noise: float | None = None  # as a Result's, of the kernels
    ranking: dict[str, float] = {}  # rank correlation of the cost model's scores, by task
    environment: dict[str, Any] = {}
    schema_version: int = SCHEMA_VERSION


class _Version(Struct):
    """What is read of a row before anything else."""

    schema_version: Size


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def append(path: Path, row: Result | TuneResult) -> None:
    """Write one row at the end of `path`, after a newline if the last line was torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tag = {"kind": row.__struct_config__.tag}
    line = stored.encode({**msgspec.structs.asdict(row), **tag, **_for_llama_bench(row)})
    with path.open("a+b") as file:
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")


def read(path: Path) -> tuple[list[Result | TuneResult], list[str]]:
    """The rows of `path`, and a warning for each line that could not be used."""
    if not path.is_file():
        raise TuneBenchError(f"no results at {path}.", "Run `tunebench bench` first, or name a results.jsonl.")
    rows: list[Result | TuneResult] = []
    warnings: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_decode(line))
        except ValueError as error:
            warnings.append(f"{path}:{number}: left out, not a result row ({error})")
    return rows, warnings


def _decode(line: bytes) -> Result | TuneResult:
    """A row; a ValueError says what does not fit. Fields that only a newer writer knows are left out."""
    version = msgspec.json.decode(line, type=_Version).schema_version
    if version > SCHEMA_VERSION:
        raise ValueError(f"schema {version} is newer than {SCHEMA_VERSION}: upgrade TuneBench")
    if version == 1:
        line = line.replace(b'"bucket":', b'"chunk":')  # only keys: in a string its quotes are escaped
    return msgspec.json.decode(line, type=Result | TuneResult)


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
