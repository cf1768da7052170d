"""Every design of every space replays, builds and computes what the default schedule does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from conftest import (
    CHUNKS,
    CONTEXT,
    THREADS,
    begin_search,
    cpu_target,
    draw_designs,
    input_of,
    load_model,
    lower,
    record_of,
)
from tvm import s_tir
from tvm.s_tir.schedule import Trace

from tunebench import environment
from tunebench.compile import passes
from tunebench.compile.tasks import Task, extract, replay
from tunebench.model import architectures, quantization
from tunebench.model import workload as workloads
from tunebench.runners.base import Candidate, Failed, Trial
from tunebench.runners.local import LocalRunner
from tunebench.spec import Workload
from tunebench.timing import Protocol
from tunebench.tuning import spaces

SCHEMES = ("q0f32", "q4f16_0", "q4f16_1", "q8f16_1", "q4i8f16_0", "q8i8f16_0")
SEEDS = (0,)
ONCE = Protocol(warmups=0, samples=1, least_samples=1)
LEVELS = {"llvm": set(), "x86-64-v3": {"avx2"}}  # this CPU with all it has, and without AVX-512


@pytest.fixture(scope="module", params=sorted(LEVELS))
def runner(request: pytest.FixtureRequest) -> Iterator[tuple[tvm.target.Target, LocalRunner]]:
    if not LEVELS[request.param] <= environment.isa():
        pytest.skip(f"this CPU cannot run {request.param}")
    target = cpu_target(request.param)
    made = LocalRunner(target, THREADS, workers=2)
    yield target, made
    made.close()


@pytest.mark.parametrize("draws", ["one", pytest.param("every", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_drawn_computes_the_defaults_result(
    scheme: str, draws: str, runner: tuple[tvm.target.Target, LocalRunner], config: Path
) -> None:
    """Each design once, or with each value of each sampling instruction, one at a time.

    Of kernels alike but for their size, the first: the others once, where every value is tried.
    """
    target, local = runner
    again = ("q0f32", "q4f16_0", "q8f16_1", *(("q4f16_1", "q8i8f16_0") if draws == "one" else ()))
    if str(target.attrs["mcpu"]) == "x86-64-v3" and scheme in again:
        pytest.skip("its schedules are those of another scheme, and of this CPU")
    failed = {}
    seen: set[tuple[object, ...]] = set()
    for task in lower(load_model(config, scheme), target)[1]:
        search = begin_search(task, target)
        kind = (search.space, *passes.block_names(s_tir.Schedule(task.mod)), *task.calls)
        if draws == "one" and kind in seen:
            continue
        designs = list(search.context.generate_design_space())
        assert designs, task.name
        traces = [
            trace
            for design in designs
            for trace in (decided(design.trace) if draws == "every" and kind not in seen else [design.trace])
        ]
        seen.add(kind)
        candidates = [Candidate(str(i), replay_trace(task, trace)) for i, trace in enumerate(traces)]
        given = input_of(task.key, passes.default_schedule(task.mod, cpu_target()))
        trial = Trial(given, ONCE, limit_ns=10**10)
        broken = local.build(trial, candidates)
        for candidate, trace in zip(candidates, traces, strict=True):
            outcome = broken.get(candidate.name) or local.time(trial, candidate.name)
            if isinstance(outcome, Failed):
                failed[f"{task.name} {trace}"] = outcome.reason
    assert not failed


def decided(trace: Trace) -> list[Trace]:
    """The trace with every value of each of its decisions."""
    sampled = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]
    changed = [
        trace.with_decision(inst, index, remove_postproc=False)
        for inst in sampled
        for index in range(len(inst.attrs[0]))
        if index != int(trace.decisions[inst])
    ]
    return [trace, *changed]


def replay_trace(task: Task, trace: Trace) -> tvm.IRModule:
    """The kernel under a trace, as a record in a database would apply it."""
    sch = s_tir.Schedule(task.mod)
    trace.apply_to_schedule(sch, remove_postproc=False)
    return sch.mod


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_drawn_schedule_replays_to_itself(scheme: str, target: tvm.target.Target, config: Path) -> None:
    for task in lower(load_model(config, scheme), target)[1]:
        for seed in SEEDS:
            for design in draw_designs(task, target, seed):
                again = replay(task.mod, record_of(task, design, target))
                assert tvm_ffi.structural_equal(again, design.mod), task.name


def test_every_kernel_has_a_space_and_every_space_a_kernel(target: tvm.target.Target, config: Path) -> None:
    known = architectures.architectures()["mixtral"]
    workload = Workload("mixtral", quantization.schemes()["q4f16_1"], 1, CHUNKS, CONTEXT)
    mixture = workloads.Model(workload, known.tiny[0], known, "mixtral")
    models = [*(load_model(config, scheme) for scheme in SCHEMES), mixture]
    found = [task for model in models for task in extract(passes.prefix(workloads.build_module(model), target), model)]
    used = {begin_search(task, target).space for task in found}
    assert used == {name for name, space in spaces.spaces().items() if space.device == "cpu"}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("tuning/spaces/cpu_dot.py", True),
        ("kernels/int8_dot.py", True),
        ("kernels/shader_dialect.py", True),
        ("kernels/templates/shader_row.py", True),
        ("kernels/cuda/matvec.cuh", True),
        ("report/words.py", False),
    ],
)
def test_the_revision_changes_with_what_a_space_draws(name: str, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = spaces.revision(), Path.read_bytes
    assert (Path(spaces.__file__).parents[2] / name).exists()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * path.as_posix().endswith(name))
    spaces.revision.cache_clear()
    assert (spaces.revision() != before) == counts
    spaces.revision.cache_clear()
