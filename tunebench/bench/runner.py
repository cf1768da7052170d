"""One model end to end: its tests on its targets under every schedule, interleaved; a row as soon as a test is done."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec.structs import replace

from tunebench import results, stats
from tunebench.bench.arms import Arm, Plan, Say, compile_arms, label, load_arms, run_test
from tunebench.bench.memory import peaks
from tunebench.compile.build import Compiled
from tunebench.compile.tasks import chunk_ns
from tunebench.devices.base import Device
from tunebench.devices.probe import PROTOCOL as PROBE
from tunebench.devices.probe import Probe
from tunebench.dtypes import DTYPES
from tunebench.engines.baselines import peers
from tunebench.model import weights
from tunebench.model.workload import Model
from tunebench.results import Quality, Result
from tunebench.runtime.conditions import Watch
from tunebench.spec import Count, Schedule, Test, Workload
from tunebench.timing import Protocol, Samples, interleave
from tunebench.tuning.lookup import Found, look_up
from tunebench.tuning.session import Lowered
from tunebench.tuning.tuner import kernels

PARAMETERS = "sum of the parameters' sizes"
AGAIN = "again"  # a second arm of the same engine, which shows the noise


def run_bench(lowered: Sequence[Lowered], plan: Plan, say: Say, warn: Say) -> Iterator[Result]:
    """Measure every test of one model on its targets; each row is on disk before it is yielded.

    A test that fails is a row too. All arms of a test are interleaved, whatever their target. `say` gets what is being
    done, `warn` what the reader of the figures must know before they come.
    """
    compiled, peak = peaks(compile_arms(lowered, plan, say, warn), plan, say)
    present = [each for each in lowered if not each.session.device.absent]
    probes = {label(each): _probe(each.session.device) for each in present}
    arms = load_arms(compiled, plan, say)
    told = {label(each): each.session.device.conditions() for each in present}
    watched = {name: told[label(arm.lowered)] for name, arm in arms.items() if label(arm.lowered) in told}
    for number, test in enumerate(plan.tests, 1):
        say(f"{test.name} ({number} of {len(plan.tests)})")
        skipped, calls = _calls(arms, test, plan)
        watch = Watch(watched)
        try:
            with watch:
                measured = _measure(calls, _twins(calls, arms), probes, plan.protocol, watch)
        except Exception as error:  # whatever the runtime raises is this test's row, and the sweep goes on
            measured = interleave(_probing(probes), PROBE)
            skipped = {**dict.fromkeys(calls, ("failed", f"{type(error).__name__}: {error}")), **skipped}
        else:
            with contextlib.suppress(Exception):  # then there is no energy
                for name, call in calls.items():
                    watch.repeat(name, call, measured[name].samples_ns)
        floors = _floors(measured, calls, arms)
        rows = {
            name: _row(arm, test, probes, measured, floors.get(label(arm.lowered)), peak.get(name))
            for name, arm in arms.items()
        }
        for name, row in rows.items():
            real = weights.are_real(arms[name].lowered.model, plan.weights)
            row = replace(row, run_id=lowered[0].session.run_id, weights="real" if real else "random")
            row = replace(row, quality=plan.quality.get(label(arms[name].lowered)) if arms[name].compiled else None)
            if name in skipped:
                row = replace(row, status=skipped[name][0], reason=skipped[name][1])
            else:
                row = replace(row, samples_ns=measured[name].samples_ns, warmup_ns=measured[name].warmup_ns)
                row = replace(row, **watch.found(name, row.samples_ns, test.n_tokens * row.batch))
            results.append(lowered[0].session.results_path, row)
            yield row


@functools.lru_cache(maxsize=2)
def _probe(device: Device) -> Probe:
    """Made once for all models of a run, as it takes seconds to choose its ways."""
    return device.probe()


def _row(
    arm: Arm,
    test: Test,
    probes: Mapping[str, Probe],
    measured: Mapping[str, Samples],
    noise: float | None,
    peak: Count | None,
) -> Result:
    """All of an arm's row but its samples."""
    row, model, target = base_row(arm, test), arm.lowered.model, label(arm.lowered)
    row = replace(row, noise=noise, memory={**_memory(model, arm), **({"peak": peak} if peak else {})})
    if target in probes:
        own = {name: measured[f"{target} {name}"] for name in probes[target].arms}
        row = replace(row, probe=probes[target].rates(own))
    if arm.loaded:  # a peer may hold the weights in another form, and then reads as much more or less
        read = model.read_bytes * (arm.loaded.weight_bytes / model.weight_bytes - 1)
        row = replace(row, bytes_per_token=row.bytes_per_token + round(read))
    if arm.compiled and arm.found:
        row = replace(row, **_coverage(arm, arm.found, arm.compiled, test))
    return row


def _floors(
    measured: Mapping[str, Samples], calls: Mapping[str, object], arms: Mapping[str, Arm]
) -> dict[str, float | None]:
    """What the two arms of the same engine differ by in this test, by target."""
    twins = {target: name for target, name in _twins(calls, arms).items() if f"{AGAIN} {target}" in measured}
    return {
        target: stats.noise_floor(measured[name].samples_ns, measured[f"{AGAIN} {target}"].samples_ns)
        for target, name in twins.items()
    }


def _twins(calls: Mapping[str, object], arms: Mapping[str, Arm]) -> dict[str, str]:
    """The arm of each target that runs a second time, to show the noise: a tuned one, or else the last."""
    found: dict[str, str] = {}
    for name in calls:
        target = label(arms[name].lowered)
        if not found.get(target, "").endswith("tuned"):
            found[target] = name
    return found


def _calls(
    arms: Mapping[str, Arm], test: Test, plan: Plan
) -> tuple[dict[str, tuple[str, str]], dict[str, Callable[[], object]]]:
    """What to time, and what not and why: what cannot run, or a sample that is known to take too long."""
    skipped: dict[str, tuple[str, str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, arm in arms.items():
        expected_s = expected_ns(arm, test) / 1e9
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
    twins: Mapping[str, str],
    probes: Mapping[str, Probe],
    protocol: Protocol,
    watch: Watch,
) -> dict[str, Samples]:
    """Every arm in turn with a twin of one of each target's, and with what the machine can do at that moment."""
    if not arms:
        return interleave(_probing(probes), PROBE)
    again = {f"{AGAIN} {target}": arms[name] for target, name in twins.items()}
    return interleave({**arms, **again, **_probing(probes)}, protocol, around=watch.around)


def _probing(probes: Mapping[str, Probe]) -> dict[str, Callable[[], object]]:
    """The arms of every target's probe."""
    return {f"{target} {name}": call for target, probe in probes.items() for name, call in probe.arms.items()}


def expected_ns(arm: Arm, test: Test) -> float:
    """Kernel time of one sample by the tuner's measurements; a kernel that has none counts as nothing."""
    found, tasks = arm.found, arm.lowered.tasks
    if not found:
        return 0.0
    chunk_sizes = [chunk.size for chunk in arm.cut(test)] + [1] * test.n_gen
    once = {
        each: chunk_ns(tasks, each, lambda task: found.time_ns(task, arm.schedule) or 0.0) for each in {*chunk_sizes}
    }
    return sum(once[size] for size in chunk_sizes)


def _coverage(arm: Arm, found: Found, compiled: Compiled, test: Test) -> dict[str, object]:
    """The kernels that a test runs, and the share of its largest chunk's time that is tuned, where that is known."""
    used = {chunk.size for chunk in arm.cut(test)} | ({1} if test.n_gen else set())
    rows = [row for row in kernels(arm.lowered.tasks, found.entries, compiled.tuned) if row.chunk in used]
    largest = max(used)
    tuned = sum(row.share for row in rows if row.chunk == largest and row.schedule != "default")
    return {"kernels": rows, "coverage": tuned if largest in arm.chunk_ns else None}


def quality_row(lowered: Lowered, quality: Quality) -> Result:
    """The row of a model's quality in a scheme, beside which nothing was timed."""
    records = look_up(lowered.tasks, lowered.session.database()).records
    schedule: Schedule = "tuned" if records else "default"
    row = base_row(Arm(lowered, lowered.session.device.engine, schedule), Test())
    memory = {"weights": Count(lowered.model.weight_bytes, PARAMETERS)}
    return replace(row, test="quality", run_id=lowered.session.run_id, weights="real", quality=quality, memory=memory)


def base_row(arm: Arm, test: Test) -> Result:
    """What a row says of what was run."""
    lowered = arm.lowered
    session, model, workload = lowered.session, lowered.model, lowered.model.workload
    mean_depth = test.n_depth + test.n_prompt + test.n_gen / 2
    return Result(
        model=model.name,
        model_id=model.model_id,
        run_name=session.run_name,
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
        model_type=f"{model.architecture.name} {model.name} {workload.scheme.name}",
        model_size=model.weight_bytes,
        model_n_params=model.n_params,
        active_n_params=model.active_n_params,
        layers=workload.layers,
        type_k=workload.kv or DTYPES[workload.scheme.dtype].short,
        type_v=workload.kv or DTYPES[workload.scheme.dtype].short,
        chunks=list(workload.chunks),
        flops_per_token=model.flops_per_token,
        multiplies=_multiplies(workload),
        bytes_per_token=round(model.read_bytes + model.cache_read_bytes(mean_depth)),
        environment={**session.described(), **_facts(arm)},
    )


def _facts(arm: Arm) -> dict[str, object]:
    """What another engine says of itself."""
    return peers()[arm.engine].facts() if arm.loaded and arm.engine in peers() else {}


def _multiplies(workload: Workload) -> str:
    """What matrix products multiply: on a GPU's tensor cores the activations' type, on a CPU float32 or bytes."""
    if workload.device_kind == "gpu":
        return workload.scheme.dtype
    return "float32" if workload.scheme.activations == "float" else "int8"


def _memory(model: Model, arm: Arm) -> dict[str, Count]:
    if arm.compiled:
        held, planned = model.weight_bytes + model.cache_bytes, arm.compiled.planned_bytes
        return {
            "weights": Count(model.weight_bytes, PARAMETERS),
            "kv_cache": Count(model.cache_bytes, "sum of the cache tensors' sizes"),
            "planned": Count(held + planned, f"weights, cache, and {planned >> 20} MiB that TVM plans for a step"),
        }
    return {"weights": Count(arm.loaded.weight_bytes, f"as {arm.engine} counts them")} if arm.loaded else {}
