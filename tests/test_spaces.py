"""Every design of every space replays, builds and computes what the default schedule does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tvm
import tvm_ffi
from conftest import THREADS, begin_search, cpu_target, draw_designs, job_of, load_model, lower, record_of

from tunebench import environment, lowering, spaces
from tunebench.database import replay
from tunebench.measure import Protocol
from tunebench.runners.local import LocalRunner

SCHEMES = ("q0f32", "q4f16_0", "q4f16_1", "q8f16_1")
SEEDS = (0, 1)
ONCE = Protocol(warmups=0, samples=1, least_samples=1)
LEVELS = {"llvm": set(), "x86-64-v3": {"avx2"}, "x86-64-v4": {"avx2", "avx512f", "avx512bw"}}


@pytest.fixture(scope="module", params=sorted(LEVELS))
def runner(request: pytest.FixtureRequest) -> Iterator[tuple[tvm.target.Target, LocalRunner]]:
    if not LEVELS[request.param] <= environment.isa():
        pytest.skip(f"this CPU cannot run {request.param}")
    target = cpu_target(request.param)
    made = LocalRunner(target, THREADS, workers=2)
    yield target, made
    made.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_design_computes_the_defaults_result(
    scheme: str, runner: tuple[tvm.target.Target, LocalRunner], config: Path
) -> None:
    target, local = runner
    failed = {}
    for task in lower(load_model(config, scheme), target)[1]:
        designs = [(seed, i, sch) for seed in SEEDS for i, sch in enumerate(draw_designs(task, target, seed))]
        assert designs, task.name
        mods = {f"{seed}.{i}": replay(task.mod, record_of(task, sch, target)) for seed, i, sch in designs}
        for seed, i, sch in designs:
            assert tvm_ffi.structural_equal(mods[f"{seed}.{i}"], sch.mod), task.name
        errors = local.build(list(mods.items()))
        job = job_of(task.key, lowering.default_schedule(task.mod))
        for name, error in errors.items():
            why = error or local.time(job, name, ONCE, limit_ns=10**10).error
            if why:
                failed[f"{task.name} {name}"] = why
        local.forget()
    assert not failed


def test_every_kernel_has_a_space_and_every_space_a_kernel(target: tvm.target.Target, config: Path) -> None:
    used = {
        begin_search(task, target).space for scheme in SCHEMES for task in lower(load_model(config, scheme), target)[1]
    }
    assert used == {name for name, space in spaces.spaces().items() if space.device == "cpu"}
