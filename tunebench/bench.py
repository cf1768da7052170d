"""One model end to end: its tests under every schedule, interleaved; a row written as soon as a test is done."""

from __future__ import annotations

import datetime
import functools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tvm

from tunebench import cuda_compiler, cuda_runtime, environment, lowering, results, stats, weights, workload
from tunebench.compile import Compiled, compile_model
from tunebench.cuda_engine import CudaEngine
from tunebench.cuda_probe import CudaProbe
from tunebench.cuda_runtime import DeviceMemory
from tunebench.database import Database, Entry, folder_name, provenance
from tunebench.engines import Engine, peers
from tunebench.errors import TuneBenchError
from tunebench.measure import Protocol, Samples, interleave
from tunebench.pieces import pieces
from tunebench.probe import PROTOCOL as PROBE
from tunebench.probe import Probe
from tunebench.results import Result, TuneResult
from tunebench.spec import Count, TargetPreset, Test, Workload
from tunebench.targets import device_name
from tunebench.tasks import Task, extract, piece_ns
from tunebench.tune import Options, Progress, Watcher, kernels, sources, tune
from tunebench.tvm_engine import TvmEngine, load
from tunebench.workload import Model

AGAIN = "again"  # a second arm of the same engine, which shows the noise
PROTOCOL = Protocol(warmups=1, samples=10, least_samples=5, budget_s=30.0, patience_s=60.0)
CACHE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # as llama-bench writes them
SCRATCH_BYTES = 768 << 20  # of the compiler, the runtime and the probe, beyond the model


@dataclass(frozen=True)
class Session:
    """What every part of a run has in common."""

    target_name: str
    preset: TargetPreset
    threads: int  # of a CPU; 0 on a GPU
    work_dir: Path
    results_path: Path
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run on a GPU."""
        return self.preset.device != "cpu"

    @functools.cached_property
    def device(self) -> str:
        """What runs the kernels, by its maker's name."""
        return device_name(self.preset)

    @functools.cached_property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return lowering.tvm_target(self.preset, self.threads)

    def database(self) -> Database:
        """The tuning database of this target and device; TuneBenchError where it was made for another."""
        made = provenance(self.target, self.device, self.threads)
        return Database(self.work_dir / "tuning_logs" / folder_name(self.target_name, made), made)


@dataclass(frozen=True)
class Lowered:
    """A model after the prefix, with its kernels."""

    model: Model
    mod: tvm.IRModule
    tasks: list[Task]


@dataclass(frozen=True)
class Plan:
    """What to measure of one model. Times in seconds."""

    tests: tuple[Test, ...]
    schedules: tuple[str, ...] = ("default", "tuned")  # of the engine tvm
    engines: tuple[str, ...] = ("tvm",)
    protocol: Protocol = PROTOCOL
    sample_limit_s: float = 300.0  # a test whose one sample would take longer is not run
    weights: Path | None = None
    seed: int = 0


def lower(session: Session, load: Workload) -> Lowered:
    """Build a workload and lower it to the point where tuning and compiling begin."""
    model = workload.load(load)
    check_memory(model)
    mod = lowering.prefix(workload.build(model), session.target)
    return Lowered(model, mod, extract(mod, model))


def check_memory(model: Model) -> None:
    """Raise a TuneBenchError where the model will not fit, before anything is allocated."""
    config, load = model.config, model.workload
    rows = max(load.buckets) * load.batch
    scratch = rows * (4 * config.intermediate_size + 8 * config.hidden_size) * 4 + SCRATCH_BYTES
    needed = model.weight_bytes + model.cache_bytes + scratch
    free = cuda_runtime.free_bytes() if load.device == "gpu" else environment.available_memory_bytes()
    if needed > free:
        raise TuneBenchError(
            f"{load.model} in {load.scheme.name} needs about {needed / 2**30:.1f} GiB "
            f"(weights {model.weight_bytes / 2**30:.1f}, KV cache {model.cache_bytes / 2**30:.1f}), "
            f"and {free / 2**30:.1f} GiB are free.",
            "Choose fewer bits, a smaller --context or --batch, or another model.",
        )


def run_tune(session: Session, lowered: Lowered, options: Options, watch: Watcher) -> TuneResult:
    """Tune one model's kernels and write what it took and brought."""
    database, load = session.database(), lowered.model.workload
    depth = min(options.depth, load.context - max(load.buckets))
    seen: list[Progress] = []

    def remember(progress: Progress) -> None:
        seen[:] = [progress]
        watch(progress)

    try:
        tune(lowered.tasks, database, session.target, replace(options, depth=depth), remember)
    finally:  # a run that was stopped has its cost too
        rows = [_tune_row(session, lowered, progress, database) for progress in seen]
        for row in rows:
            results.append(session.results_path, row)
    return rows[0]


def _tune_row(session: Session, lowered: Lowered, progress: Progress, database: Database) -> TuneResult:
    load = lowered.model.workload
    found = kernels(lowered.tasks, database.entries, sources(database.promoted()))
    ranks = {search.task.name: search.ranks for search in progress.searches if search.ranks}
    return TuneResult(
        model=model_name(load),
        scheme=load.scheme.name,
        target=session.target_name,
        device=session.device,
        batch=load.batch,
        n_threads=session.threads,
        run_id=session.run_id,
        test_time=_now(),
        trials=progress.trials,
        valid_trials=progress.valid,
        cost_s={**progress.costs.seconds, "total": progress.elapsed_s},
        curve=progress.curve,
        kernels=[kernel for kernel in found if kernel.phase in progress.phases],
        noise=progress.noise,
        ranking={name: float(np.mean(values)) for name, values in ranks.items()},
        environment=environment.describe(),
    )


def model_name(load: Workload) -> str:
    """How rows name a model: a file's stem for a path."""
    return Path(load.model).stem if load.model.endswith(".json") else load.model


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared: an engine under a schedule; or why there is none."""

    engine: str
    schedule: str  # default, tuned; library for an engine that brings its own kernels
    loaded: Engine | None = None
    compiled: Compiled | None = None
    reason: str = ""


def run_bench(session: Session, lowered: Lowered, plan: Plan, say: Callable[[str], None]) -> Iterator[Result]:
    """Measure every test; each row is on disk before it is yielded. A test that fails is a row too."""
    database = session.database()
    probe = CudaProbe() if session.on_gpu else Probe(session.target, session.threads)
    memory = DeviceMemory() if session.on_gpu else None
    arms = _load_arms(session, lowered, database, plan, say)
    noise: float | None = None
    for number, test in enumerate(plan.tests, 1):
        say(f"{test.name} ({number} of {len(plan.tests)})")
        base = _base_row(session, lowered, test)
        peak = environment.PeakRss()
        skipped, calls = _calls(lowered, database, arms, test, plan)
        try:
            measured = _measure(calls, probe, noise is None, plan.protocol)
        except Exception as error:  # whatever the runtime raises is this test's row, and the sweep goes on
            measured = interleave(probe.arms, PROBE)
            skipped = {**dict.fromkeys(calls, ("failed", f"{type(error).__name__}: {error}")), **skipped}
        base = replace(base, probe=probe.rates(measured))
        alone = len(arms) == 1 or (len(plan.engines) == 1 and not memory)
        top = memory.taken() if memory else _peak(peak, probe)
        top = top if alone else Count(None, "several engines in one process")
        if AGAIN in measured:
            noise = stats.noise_floor(measured[_twin(calls)].samples_ns, measured[AGAIN].samples_ns)
        for name, arm in arms.items():
            row = replace(base, engine=arm.engine, schedule=arm.schedule, noise=noise)
            row = replace(row, memory={**_memory(lowered.model, arm), "peak": top})
            if arm.loaded:  # a peer may hold the weights in another form, and then reads as much more or less
                read = lowered.model.read_bytes * (arm.loaded.weight_bytes / lowered.model.weight_bytes - 1)
                row = replace(row, bytes_per_token=base.bytes_per_token + round(read))
            if arm.compiled:
                covered = _coverage(lowered, database, arm.compiled, test)
                row = replace(row, **covered)  # type: ignore[arg-type]
            if name in skipped:
                row = replace(row, status=skipped[name][0], reason=skipped[name][1])
            else:
                row = replace(row, samples_ns=measured[name].samples_ns, warmup_ns=measured[name].warmup_ns)
            results.append(session.results_path, row)
            yield row


def _twin(calls: Mapping[str, object]) -> str:
    """The arm that runs a second time, to show the noise: tuned, or else the last."""
    return "tuned" if "tuned" in calls else list(calls)[-1]


def _load_arms(
    session: Session, lowered: Lowered, database: Database, plan: Plan, say: Callable[[str], None]
) -> dict[str, Arm]:
    """Every arm by name, its weights loaded."""
    model = lowered.model
    arms: dict[str, Arm] = {}
    for name in plan.engines:
        if name == "tvm":
            say("compile")
            compiled = _compile(session, lowered, database, plan.schedules)
            say("load weights")
            device, kind = tvm.device(session.preset.device), CudaEngine if session.on_gpu else TvmEngine
            loaded = load(model, _weights(model, plan), device)
            for schedule, each in compiled.items():
                arms[schedule] = Arm(name, schedule, kind(model, each.executable, loaded, device), each)
            continue
        peer = peers()[name]
        reason = peer.refuses(model) or _no_room(model)
        if not reason:
            say(f"load weights into {name}")
            session.work_dir.mkdir(parents=True, exist_ok=True)
            engine = peer.load(model, _weights(model, plan), session.threads, session.work_dir)
            arms[name] = Arm(name, "library", engine)
        else:
            arms[name] = Arm(name, "library", reason=reason)
    return arms


def _no_room(model: Model) -> str:
    """Why another copy of the weights and the cache will not fit, or an empty string."""
    if model.workload.device == "gpu":
        return ""  # a peer says itself what it finds no room for
    needed, free = model.weight_bytes + model.cache_bytes + SCRATCH_BYTES, environment.available_memory_bytes()
    if needed <= free:
        return ""
    return f"a second copy of the model needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _weights(model: Model, plan: Plan) -> Iterable[tuple[str, np.ndarray]]:
    return weights.read(model, plan.weights) if plan.weights else workload.random_weights(model, plan.seed)


def _compile(session: Session, lowered: Lowered, database: Database, schedules: Iterable[str]) -> dict[str, Compiled]:
    records = database.promoted()
    if session.on_gpu:
        cuda_compiler.install(session.work_dir / "cubins")
    if "tuned" in schedules and not any(task.key in records for task in lowered.tasks):
        raise TuneBenchError(
            f"nothing tuned for {model_name(lowered.model.workload)} in {database.folder}.",
            "Run `tunebench tune` first, or bench with --schedule default.",
        )
    return {name: compile_model(lowered.mod, session.target, records if name == "tuned" else {}) for name in schedules}


def _calls(
    lowered: Lowered, database: Database, arms: Mapping[str, Arm], test: Test, plan: Plan
) -> tuple[dict[str, tuple[str, str]], dict[str, Callable[[], object]]]:
    """What to time, and what not and why: what cannot run, or a sample that is known to take too long."""
    skipped: dict[str, tuple[str, str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, arm in arms.items():
        expected_s = expected_ns(lowered, database, arm.schedule, test) / 1e9 if arm.compiled else 0.0
        if arm.loaded is None:
            skipped[name] = ("not_run", arm.reason)
        elif expected_s > plan.sample_limit_s:
            reason = f"one sample would take about {expected_s:.0f} s by its kernels' times, and the limit is "
            skipped[name] = ("not_run", f"{reason}{plan.sample_limit_s:.0f} s (--sample-limit)")
        else:
            calls[name] = functools.partial(run_test, arm.loaded, lowered.model, test, plan.seed)
    return skipped, calls


def _measure(
    arms: dict[str, Callable[[], object]], probe: Probe | CudaProbe, with_noise: bool, protocol: Protocol
) -> dict[str, Samples]:
    """Every arm in turn with what the machine can do at that moment."""
    if not arms:
        return interleave(probe.arms, PROBE)
    if with_noise:
        arms = {**arms, AGAIN: arms[_twin(arms)]}
    return interleave({**arms, **probe.arms}, protocol)


def run_test(engine: Engine, model: Model, test: Test, seed: int) -> None:
    """One sample of a test: prompt, then generated tokens, at depth. Neither tokenizes nor samples."""
    load, vocab = model.workload, model.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, (load.batch, test.n_tokens), np.int32)
    if test.n_prompt:
        engine.prefill(tokens[:, : test.n_prompt], test.n_depth)
    for i in range(test.n_prompt, test.n_tokens):
        engine.decode(tokens[:, i : i + 1], test.n_depth + i)
    engine.wait()


def expected_ns(lowered: Lowered, database: Database, schedule: str, test: Test) -> float:
    """Kernel time of one sample by the tuner's measurements; 0 where it made none."""

    def time_ns(task: Task) -> float:
        entry = database.entries.get(task.key, Entry(task.name))
        won = schedule == "tuned" and entry.decision == "promoted"
        samples = entry.tuned_ns if won else entry.default_ns
        return stats.median(samples) if samples else 0.0

    load = lowered.model.workload
    prompt = pieces(test.n_prompt, test.n_depth, load.chunks, load.context)
    buckets = [piece.bucket for piece in prompt] + [1] * test.n_gen
    return sum(piece_ns(lowered.tasks, bucket, time_ns) * buckets.count(bucket) for bucket in set(buckets))


def _coverage(lowered: Lowered, database: Database, compiled: Compiled, test: Test) -> dict[str, object]:
    """The kernels that a test runs, and the share of its largest piece's time that is tuned."""
    load = lowered.model.workload
    prompt = pieces(test.n_prompt, test.n_depth, load.chunks, load.context)
    used = {piece.bucket for piece in prompt} | ({1} if test.n_gen else set())
    rows = [row for row in kernels(lowered.tasks, database.entries, compiled.tuned) if row.bucket in used]
    of_largest = [row for row in rows if row.bucket == max(used)]
    known = any(row.share for row in of_largest)
    share = sum(row.share for row in of_largest if row.schedule != "default") if known else None
    return {"kernels": rows, "coverage": share}


def _base_row(session: Session, lowered: Lowered, test: Test) -> Result:
    model, load = lowered.model, lowered.model.workload
    mean_depth = test.n_depth + test.n_prompt + test.n_gen / 2
    return Result(
        model=model_name(load),
        scheme=load.scheme.name,
        schedule="",
        engine="",
        target=session.target_name,
        device=session.device,
        test=test.name,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        batch=load.batch,
        n_threads=session.threads,
        status="ok",
        run_id=session.run_id,
        test_time=_now(),
        model_type=f"{model.architecture.name} {model_name(load)} {load.scheme.name}",
        model_size=model.weight_bytes,
        model_n_params=model.n_params,
        type_k=CACHE_TYPES[load.scheme.dtype],
        type_v=CACHE_TYPES[load.scheme.dtype],
        chunks=list(load.chunks),
        flops_per_token=model.flops_per_token,
        multiplies=_multiplies(load),
        bytes_per_token=round(model.read_bytes + model.cache_bytes_per_token * mean_depth * load.batch),
        environment=environment.describe(),
    )


def _multiplies(load: Workload) -> str:
    """What matrix products multiply: on a GPU's tensor cores the activations' type, on a CPU float32 or bytes."""
    if load.device == "gpu":
        return load.scheme.dtype
    return "int8" if load.scheme.activations == "int8" else "float32"


def _memory(model: Model, arm: Arm) -> dict[str, Count]:
    if arm.compiled:
        held, planned = model.weight_bytes + model.cache_bytes, arm.compiled.planned_bytes
        return {
            "weights": Count(model.weight_bytes, "sum of the parameters' sizes"),
            "kv_cache": Count(model.cache_bytes, "sum of the cache tensors' sizes"),
            "planned": Count(held + planned, f"weights, cache, and {planned >> 20} MiB that TVM plans for a step"),
        }
    return {"weights": Count(arm.loaded.weight_bytes, f"as {arm.engine} counts them")} if arm.loaded else {}


def _peak(peak: environment.PeakRss, probe: Probe | CudaProbe) -> Count:
    most = peak.read()
    rest = None if most.bytes is None else most.bytes - probe.held_bytes
    return Count(rest, f"{most.counter}, less the probe's {probe.held_bytes >> 20} MiB")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
