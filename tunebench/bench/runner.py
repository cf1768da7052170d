"""One model end to end: its tests on its targets under every schedule, interleaved; a row as soon as a test is done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from msgspec.structs import replace

from tunebench import environment, results, stats
from tunebench.bench.arms import Arm, Plan, label, load_arms
from tunebench.compile.build import Compiled
from tunebench.compile.tasks import Task, chunk_ns
from tunebench.devices.probe import PROTOCOL as PROBE
from tunebench.devices.probe import Probe
from tunebench.dtypes import DTYPES
from tunebench.engines.base import Engine
from tunebench.engines.chunked import split_prompt
from tunebench.model.workload import Model
from tunebench.results import Result
from tunebench.runtime.conditions import Watch
from tunebench.spec import Count, Test, Workload
from tunebench.timing import Protocol, Samples, interleave
from tunebench.tuning.database import Database
from tunebench.tuning.entry import Entry
from tunebench.tuning.session import Lowered, model_name
from tunebench.tuning.tuner import kernels

AGAIN = "again"  # a second arm of the same engine, which shows the noise


def run_bench(lowered: Sequence[Lowered], plan: Plan, say: Callable[[str], None]) -> Iterator[Result]:
    """Measure every test of one model on its targets; each row is on disk before it is yielded.

    A test that fails is a row too. All arms of a test are interleaved, whatever their target.
    """
    present = [each for each in lowered if not each.session.device.absent]
    probes = {label(each): each.session.device.probe() for each in present}
    memory = present[0].session.device.memory() if present else None
    arms = load_arms(lowered, plan, say)
    told = {label(each): each.session.device.conditions() for each in present}
    watched = {name: told[label(arm.lowered)] for name, arm in arms.items() if label(arm.lowered) in told}
    noise: float | None = None
    for number, test in enumerate(plan.tests, 1):
        say(f"{test.name} ({number} of {len(plan.tests)})")
        peak = environment.PeakRss()
        skipped, calls = _calls(arms, test, plan)
        watch = Watch(watched)
        try:
            with watch:
                measured = _measure(calls, probes, noise is None, plan.protocol, watch)
        except Exception as error:  # whatever the runtime raises is this test's row, and the sweep goes on
            measured = interleave(_probing(probes), PROBE)
            skipped = {**dict.fromkeys(calls, ("failed", f"{type(error).__name__}: {error}")), **skipped}
        alone = len(arms) == 1 or (len(plan.engines) == 1 and len(lowered) == 1 and not memory)
        held = sum(probe.held_bytes for probe in probes.values())
        top = memory.taken() if memory else _peak(peak, held)
        top = top if alone else Count(None, "several engines in one process")
        if AGAIN in measured:
            noise = stats.noise_floor(measured[_twin(calls)].samples_ns, measured[AGAIN].samples_ns)
        rows = {name: _row(arm, test, probes, measured, noise, top) for name, arm in arms.items()}
        for name, row in rows.items():
            row = replace(row, run_id=lowered[0].session.run_id)
            if name in skipped:
                row = replace(row, status=skipped[name][0], reason=skipped[name][1])
            else:
                row = replace(row, samples_ns=measured[name].samples_ns, warmup_ns=measured[name].warmup_ns)
                row = replace(row, **watch.found(name, row.samples_ns, test.n_tokens * row.batch))
            results.append(lowered[0].session.results_path, row)
            yield row


def _row(
    arm: Arm,
    test: Test,
    probes: Mapping[str, Probe],
    measured: Mapping[str, Samples],
    noise: float | None,
    top: Count,
) -> Result:
    """All of an arm's row but its samples."""
    row, model, target = _base_row(arm, test), arm.lowered.model, label(arm.lowered)
    row = replace(row, noise=noise, memory={**_memory(model, arm), "peak": top})
    if target in probes:
        own = {name: measured[f"{target} {name}"] for name in probes[target].arms}
        row = replace(row, probe=probes[target].rates(own))
    if arm.loaded:  # a peer may hold the weights in another form, and then reads as much more or less
        read = model.read_bytes * (arm.loaded.weight_bytes / model.weight_bytes - 1)
        row = replace(row, bytes_per_token=row.bytes_per_token + round(read))
    if arm.compiled and arm.database:
        covered = _coverage(arm.lowered, arm.database, arm.compiled, test)
        row = replace(row, **covered)
    return row


def _twin(calls: Mapping[str, object]) -> str:
    """The arm that runs a second time, to show the noise: a tuned one, or else the last."""
    return next((name for name in calls if name.endswith("tuned")), list(calls)[-1])


def _calls(
    arms: Mapping[str, Arm], test: Test, plan: Plan
) -> tuple[dict[str, tuple[str, str]], dict[str, Callable[[], object]]]:
    """What to time, and what not and why: what cannot run, or a sample that is known to take too long."""
    skipped: dict[str, tuple[str, str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, arm in arms.items():
        expected_s = expected_ns(arm.lowered, arm.database, arm.schedule, test) / 1e9 if arm.database else 0.0
        if arm.loaded is None:
            skipped[name] = ("not_run", arm.reason)
        elif expected_s > plan.sample_limit_s:
            reason = f"one sample would take about {expected_s:.0f} s by its kernels' times, and the limit is "
            skipped[name] = ("not_run", f"{reason}{plan.sample_limit_s:.0f} s (--sample-limit)")
        else:
            calls[name] = functools.partial(run_test, arm.loaded, arm.lowered.model, test, plan.seed)
    return skipped, calls


def _measure(
    arms: dict[str, Callable[[], object]],
    probes: Mapping[str, Probe],
    with_noise: bool,
    protocol: Protocol,
    watch: Watch,
) -> dict[str, Samples]:
    """Every arm in turn with what the machine can do at that moment."""
    if not arms:
        return interleave(_probing(probes), PROBE)
    if with_noise:
        arms = {**arms, AGAIN: arms[_twin(arms)]}
    return interleave({**arms, **_probing(probes)}, protocol, around=watch.around)


def _probing(probes: Mapping[str, Probe]) -> dict[str, Callable[[], object]]:
    """The arms of every target's probe."""
    return {f"{target} {name}": call for target, probe in probes.items() for name, call in probe.arms.items()}


def run_test(engine: Engine, model: Model, test: Test, seed: int) -> None:
    """One sample of a test: prompt, then generated tokens, at depth. Neither tokenizes nor samples."""
    workload, vocab = model.workload, model.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, (workload.batch, test.n_tokens), np.int32)
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

    workload = lowered.model.workload
    prompt = split_prompt(test.n_prompt, test.n_depth, workload.chunks, workload.context)
    chunk_sizes = [chunk.size for chunk in prompt] + [1] * test.n_gen
    return sum(chunk_ns(lowered.tasks, chunk, time_ns) * chunk_sizes.count(chunk) for chunk in set(chunk_sizes))


def _coverage(lowered: Lowered, database: Database, compiled: Compiled, test: Test) -> dict[str, object]:
    """The kernels that a test runs, and the share of its largest chunk's time that is tuned."""
    workload = lowered.model.workload
    prompt = split_prompt(test.n_prompt, test.n_depth, workload.chunks, workload.context)
    used = {chunk.size for chunk in prompt} | ({1} if test.n_gen else set())
    rows = [row for row in kernels(lowered.tasks, database.entries, compiled.tuned) if row.chunk in used]
    of_largest = [row for row in rows if row.chunk == max(used)]
    known = any(row.share for row in of_largest)
    share = sum(row.share for row in of_largest if row.schedule != "default") if known else None
    return {"kernels": rows, "coverage": share}


def _base_row(arm: Arm, test: Test) -> Result:
    lowered = arm.lowered
    session, model, workload = lowered.session, lowered.model, lowered.model.workload
    mean_depth = test.n_depth + test.n_prompt + test.n_gen / 2
    return Result(
        model=model_name(workload),
        scheme=workload.scheme.name,
        schedule=arm.schedule,
        engine=arm.engine,
        target=session.device.target_name,
        device=session.device.name,
        test=test.name,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        batch=workload.batch,
        n_threads=session.threads,
        status="ok",
        run_id=session.run_id,
        test_time=results.now(),
        model_type=f"{model.architecture.name} {model_name(workload)} {workload.scheme.name}",
        model_size=model.weight_bytes,
        model_n_params=model.n_params,
        type_k=DTYPES[workload.scheme.dtype].short,
        type_v=DTYPES[workload.scheme.dtype].short,
        chunks=list(workload.chunks),
        flops_per_token=model.flops_per_token,
        multiplies=_multiplies(workload),
        bytes_per_token=round(model.read_bytes + model.cache_bytes_per_token * mean_depth * workload.batch),
        environment=session.described(),
    )


def _multiplies(workload: Workload) -> str:
    """What matrix products multiply: on a GPU's tensor cores the activations' type, on a CPU float32 or bytes."""
    if workload.device_kind == "gpu":
        return workload.scheme.dtype
    return "int8" if workload.scheme.activations == "int8" else "float32"


def _memory(model: Model, arm: Arm) -> dict[str, Count]:
    if arm.compiled:
        held, planned = model.weight_bytes + model.cache_bytes, arm.compiled.planned_bytes
        return {
            "weights": Count(model.weight_bytes, "sum of the parameters' sizes"),
            "kv_cache": Count(model.cache_bytes, "sum of the cache tensors' sizes"),
            "planned": Count(held + planned, f"weights, cache, and {planned >> 20} MiB that TVM plans for a step"),
        }
    return {"weights": Count(arm.loaded.weight_bytes, f"as {arm.engine} counts them")} if arm.loaded else {}


def _peak(peak: environment.PeakRss, probe_bytes: int) -> Count:
    most = peak.read()
    rest = None if most.bytes is None else max(0, most.bytes - probe_bytes)
    return Count(rest, f"{most.counter}, less the probe's {probe_bytes >> 20} MiB")
