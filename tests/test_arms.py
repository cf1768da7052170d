"""What a bench compares: each arm's memory alone, a twin in every test, shares that are known or not given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import load_model, lower, write_config

from tunebench import stats
from tunebench.bench import memory, runner
from tunebench.bench.arms import Arm, Plan, compile_arms, load_arms
from tunebench.devices import cpu_probe, opening, targets
from tunebench.spec import Test
from tunebench.timing import Protocol, Samples
from tunebench.tuning.database import Database, Entry, read_provenance
from tunebench.tuning.lookup import Found
from tunebench.tuning.records import record_line
from tunebench.tuning.session import Lowered, Session

BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 98304}
TESTS = (Test(n_prompt=16), Test(n_gen=2))
PLAN = Plan(TESTS, ("default",), protocol=Protocol(warmups=1, samples=stats.FEWEST, budget_s=60.0))


def lowered_model(config: Path, scheme: str, folder: Path) -> Lowered:
    session = Session(opening.open_device(targets.find("llvm"), 2), folder, folder / "results.jsonl", "nightly")
    model = load_model(config, scheme)
    return Lowered(session, model, *lower(model, session.target))


def silent(words: str) -> None:
    """Nothing."""


@pytest.mark.parametrize("linker", [True, False])
def test_a_peak_is_of_one_arm_alone(linker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process the second of two schemes had the first's memory, too: q4 came out above float32."""
    if not linker:
        monkeypatch.setattr(memory.cc, "get_cc", lambda: None)
    config = write_config(tmp_path, **BIG)
    found: dict[str, int] = {}
    held: dict[str, int] = {}
    for scheme in ("q0f32", "q4f16_1"):
        lowered = lowered_model(config, scheme, tmp_path)
        arms, taken = memory.peaks(compile_arms([lowered], PLAN, silent, silent), PLAN, silent)
        (count,) = taken.values()
        assert "of a process of its own, of which " in count.counter, count
        found[scheme], held[scheme] = count.bytes or 0, lowered.model.weight_bytes
        assert load_arms(arms, PLAN, silent)["default"].loaded  # as the bench goes on
    assert held["q0f32"] > 150 << 20
    assert found["q0f32"] > held["q0f32"]
    assert found["q0f32"] - found["q4f16_1"] > 0.7 * (held["q0f32"] - held["q4f16_1"])


def test_a_process_that_ends_early_leaves_its_reason(config: Path, tmp_path: Path) -> None:
    lowered = lowered_model(config, "q0f32", tmp_path)
    compiled = compile_arms([lowered], PLAN, silent, silent)
    (count,) = memory.peaks(compiled, Plan(TESTS, ("default",), weights=str(tmp_path / "none")), silent)[1].values()
    assert count.bytes is None
    assert "failed: " in count.counter


def test_every_test_has_a_twin_of_its_own(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor of a prompt's samples says nothing of a token's."""
    monkeypatch.setattr(cpu_probe, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(runner, "peaks", lambda arms, *_: (arms, {}))
    measured: list[tuple[str, ...]] = []

    def interleave(arms: Mapping[str, Any], protocol: Protocol, **_: Any) -> dict[str, Samples]:
        """Made-up times, with twice the difference between twins in the second test."""
        measured.append(tuple(arms))
        return {
            name: Samples(
                [], [1000 + (i % 5) * (20 if name.startswith("again") else 1) * len(measured) for i in range(30)]
            )
            for name in arms
        }

    monkeypatch.setattr(runner, "interleave", interleave)
    rows = list(runner.run_bench([lowered_model(config, "q0f32", tmp_path)], PLAN, silent, silent))
    assert [row.test for row in rows] == ["pp16", "tg2"]
    assert all({"default", "again llvm"} <= set(arms) for arms in measured)
    first, second = (row.noise for row in rows)
    assert first is not None
    assert second is not None
    assert second > first > 0
    assert {(row.model, row.run_name) for row in rows} == {("tiny", "nightly")}
    assert {row.model_id for row in rows} == {load_model(config, "q0f32").model_id}


@pytest.mark.parametrize(("timed", "coverage"), [(True, 0.0), (False, None)])
def test_a_share_that_is_not_known_is_not_zero(
    timed: bool, coverage: float | None, config: Path, tmp_path: Path
) -> None:
    lowered = lowered_model(config, "q0f32", tmp_path)
    entries = {task.key: Entry(task.name, default_ns=[1000], decision="kept default") for task in lowered.tasks}
    if not timed:
        entries.pop(next(task.key for task in lowered.tasks if 16 in task.calls and "silu" in task.name))
    made = compile_arms([lowered], PLAN, silent, silent)["default"]
    arm = Arm(lowered, made.engine, "default", compiled=made.compiled, found=Found({}, entries, {}))
    assert made.compiled
    assert arm.found
    row = runner._coverage(arm, arm.found, made.compiled, Test(n_prompt=16))
    assert row["coverage"] == coverage
    kernels: Any = row["kernels"]
    assert [kernel.task for kernel in kernels if "never measured" in kernel.reason] == ([] if timed else ["silu_mul1"])


def test_records_reach_the_process_that_measures_as_they_are() -> None:
    """Where there is no linker; those of the database that comes with TuneBench, which hold index maps, too."""
    folder = Path(__file__).parent.parent / "tuning_logs/llvm-amd-epyc-znver5-2t"
    promoted = Database(folder, read_provenance(folder)).promoted()
    sent = memory._read(tuple((key, *memory._written(record)) for key, record in promoted.items()))
    assert {key: record_line(record, 0) for key, record in sent.items()} == {
        key: record_line(record, 0) for key, record in promoted.items()
    }
    assert any(b"TransformLayout" in record_line(record, 0) for record in sent.values())
