"""Real tuning runs of a few seconds: resumed, interrupted, judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from conftest import load_model, lower

from tunebench import stats
from tunebench.compile.tasks import Task
from tunebench.devices.targets import cpu_device
from tunebench.runners.base import Job, Outcome
from tunebench.runners.local import LocalRunner
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.search import Trials
from tunebench.tuning.tuner import Options, Progress, kernels, sources, tune

OPTIONS = Options(trials=6, time_limit_s=60, threads=2, depth=40, cold_bytes=1 << 15)
PICKED = ("silu_mul", "matmul", "attention")  # of decode, one of each space

pytestmark = pytest.mark.usefixtures("small_caches")


@pytest.fixture(scope="module")
def found(target: tvm.target.Target, config: Path) -> list[Task]:
    """Three small tasks."""
    of_decode = [task for task in lower(load_model(config, "q0f32"), target)[1] if 1 in task.calls]
    return [next(task for task in of_decode if task.name.startswith(name)) for name in PICKED]


class Watched(LocalRunner):
    """A runner that counts what it times, and whose times are made up."""

    timed: Counter[tuple[str, int]]
    stop_after: int
    tuned_ns: int

    def prepare(self, job: Job, protocol: Any) -> Outcome:
        return Outcome((1000,) * 5)

    def time(self, job: Job, name: str, protocol: Any, limit_ns: int) -> Outcome:
        if sum(self.timed.values()) >= self.stop_after:
            raise KeyboardInterrupt
        self.timed[job.name, int(name)] += 1
        return Outcome((self.tuned_ns + int(name) % 10,) * 5)

    def duel(
        self, job: Job, candidates: Sequence[tuple[str, tvm.IRModule]], protocol: Any, with_default: bool = True
    ) -> dict[str, Outcome]:
        times = {name: 1000 if mod.script() == default_of(job) else self.tuned_ns for name, mod in candidates}
        times.update({"default": 1000} if with_default else {})
        return {name: Outcome(tuple(ns + i % 3 for i in range(21))) for name, ns in times.items()}


def default_of(job: Job) -> str:
    """A job's reference as a script."""
    return str(tvm.ir.load_json(job.reference).script())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """Tuning with made-up times."""
    monkeypatch.setitem(globals(), "LocalRunner", Watched)
    monkeypatch.setattr(Watched, "timed", Counter(), raising=False)
    monkeypatch.setattr(Watched, "stop_after", 10**9, raising=False)
    monkeypatch.setattr(Watched, "tuned_ns", 500, raising=False)
    return Watched


def run(found: list[Task], target: tvm.target.Target, folder: Path, options: Options = OPTIONS) -> Progress:
    """One tuning run."""
    database = Database(folder, provenance(target, cpu_device(), 2))
    return tune(found, database, target, lambda: LocalRunner(target, 2, 2), options, lambda progress: None)


def reopened(folder: Path, target: tvm.target.Target) -> Database:
    """What a run left."""
    return Database(folder, provenance(target, cpu_device(), 2))


def test_a_second_run_measures_nothing_twice(
    found: list[Task], target: tvm.target.Target, tmp_path: Path, watched: type[Watched]
) -> None:
    first = run(found, target, tmp_path)
    kept = Trials(reopened(tmp_path, target).open_search()).measured
    assert first.trials == first.valid == len(kept) == sum(watched.timed.values()) > len(found)
    assert set(watched.timed.values()) == {1}
    second = run(found, target, tmp_path)
    assert second.trials == 0
    assert Trials(reopened(tmp_path, target).open_search()).measured == kept
    more = run(found, target, tmp_path, Options(trials=40, time_limit_s=20, threads=2, depth=40, cold_bytes=1 << 15))
    assert set(watched.timed.values()) == {1}
    assert more.trials + first.trials == sum(watched.timed.values())


def test_rounds_that_overlap_are_as_good(
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watched, "builds_ahead", True)
    busy: list[tuple[str, ...]] = []

    def watch(progress: Progress) -> None:
        busy.append(tuple(search.task.name for search in progress.searches if search.doing == "search"))

    database = Database(tmp_path, provenance(target, cpu_device(), 2))
    progress = tune(found, database, target, lambda: LocalRunner(target, 2, 2), OPTIONS, watch)
    kept = Trials(reopened(tmp_path, target).open_search()).measured
    assert progress.trials == progress.valid == len(kept) == sum(watched.timed.values())
    assert set(watched.timed.values()) == {1}
    assert {name for names in busy for name in names} == {task.name for task in found}
    assert run(found, target, tmp_path).trials == 0


def test_a_kernel_goes_on_at_the_depth_where_it_was_measured(
    found: list[Task], target: tvm.target.Target, tmp_path: Path, watched: type[Watched]
) -> None:
    run(found, target, tmp_path)
    more = run(found, target, tmp_path, replace(OPTIONS, trials=8, depth=70))
    assert {search.depth for search in more.searches} == {OPTIONS.depth}
    assert {entry.depth for entry in reopened(tmp_path, target).entries.values()} == {OPTIONS.depth}


def test_only_the_phase_that_was_asked_for(
    found: list[Task], target: tvm.target.Target, tmp_path: Path, watched: type[Watched]
) -> None:
    of_prefill, *of_decode = found
    mixed = [replace(of_prefill, calls={16: 3}), *of_decode]
    progress = run(mixed, target, tmp_path, replace(OPTIONS, phases=("decode",)))
    assert {search.task.key for search in progress.searches} == {task.key for task in of_decode}
    assert all(point["decode_ns"] > 0 and point["prefill_ns"] == 0 for point in progress.curve)
    assert set(reopened(tmp_path, target).entries) == {task.key for task in of_decode}


def test_an_interrupted_run_goes_on(
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watched, "stop_after", 2)
    with pytest.raises(KeyboardInterrupt):
        run(found, target, tmp_path)
    left = reopened(tmp_path, target)
    assert len(Trials(left.open_search()).measured) == 2
    assert all(entry.default_ns for entry in left.entries.values())
    assert {row.reason for row in kernels(found, left.entries, {})} == {"not judged yet: the run was stopped"}
    monkeypatch.setattr(watched, "stop_after", 10**9)
    run(found, target, tmp_path)
    assert set(watched.timed.values()) == {1}
    assert all(entry.decision for entry in reopened(tmp_path, target).entries.values())


@pytest.mark.parametrize(("tuned_ns", "decision"), [(500, "promoted"), (2000, "kept default")])
def test_a_verdict_decides_and_says_why(
    tuned_ns: int,
    decision: str,
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watched, "tuned_ns", tuned_ns)
    run(found, target, tmp_path)
    database = reopened(tmp_path, target)
    assert {entry.decision for entry in database.entries.values()} == {decision}
    assert all(entry.reason for entry in database.entries.values())
    assert set(database.promoted()) == ({task.key for task in found} if decision == "promoted" else set())
    for row in kernels(found, database.entries, sources(database.promoted())):
        assert row.decision == decision
        assert row.schedule == ("tuned" if decision == "promoted" else "default")
        assert stats.median(row.tuned_ns) == pytest.approx(tuned_ns, abs=3)


def test_a_winner_is_lost_only_to_a_verdict(
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(found, target, tmp_path)
    before = set(reopened(tmp_path, target).promoted())
    assert before == {task.key for task in found}

    def duel(self: Watched, job: Job, candidates: Sequence[tuple[str, tvm.IRModule]], *_: Any, **__: Any) -> Any:
        return {name: Outcome(error="it hung") for name, _ in candidates}

    monkeypatch.setattr(watched, "tuned_ns", 300)  # new trials that look better, and cannot be measured again
    monkeypatch.setattr(watched, "duel", duel)
    run(found, target, tmp_path, Options(trials=12, time_limit_s=30, threads=2, depth=40, cold_bytes=1 << 15))
    after = reopened(tmp_path, target)
    assert set(after.promoted()) == before
    assert {entry.decision for entry in after.entries.values()} == {"promoted"}


def test_a_verdict_that_was_stopped_is_taken_again(
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Any, **__: Any) -> dict[str, Outcome]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(watched, "duel", stop)
        with pytest.raises(KeyboardInterrupt):
            run(found, target, tmp_path)
    assert reopened(tmp_path, target).promoted() == {}
    run(found, target, tmp_path)
    assert set(reopened(tmp_path, target).promoted()) == {task.key for task in found}


def test_a_default_that_fails_is_a_reason_not_an_end(
    found: list[Task],
    target: tvm.target.Target,
    tmp_path: Path,
    watched: type[Watched],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = found[0]

    def prepare(self: Watched, job: Job, protocol: Any) -> Outcome:
        return Outcome(error="it crashed") if job.name == broken.key else Outcome((1000,) * 5)

    monkeypatch.setattr(watched, "prepare", prepare)
    run(found, target, tmp_path)
    entries = reopened(tmp_path, target).entries
    assert entries[broken.key].decision == "kept default"
    assert "it crashed" in entries[broken.key].reason
    assert {entries[task.key].decision for task in found[1:]} == {"promoted"}


def test_without_made_up_times_it_holds_too(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    progress = run(found, target, tmp_path, Options(trials=3, time_limit_s=15, threads=2, depth=40, cold_bytes=1 << 15))
    assert progress.valid == progress.trials > 0
    database = reopened(tmp_path, target)
    assert {entry.decision for entry in database.entries.values()} <= {"promoted", "kept default", "inconclusive"}
    assert set(database.promoted()) == {k for k, e in database.entries.items() if e.decision == "promoted"}
    assert progress.curve[-1]["trials"] == progress.trials
    assert sum(progress.costs.seconds.values()) <= progress.elapsed_s
