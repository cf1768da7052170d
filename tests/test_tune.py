"""Tuning runs: resumed, interrupted, judged. All but one replay made-up times in place of building."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tvm
from conftest import load_model, lower
from tvm.s_tir import meta_schedule as ms

from tunebench import stats
from tunebench.compile.tasks import Task
from tunebench.devices.targets import cpu_device
from tunebench.errors import TuneBenchError
from tunebench.runners.base import Candidate, Died, MeasureInput, Outcome, Runner, Timed, Trial
from tunebench.runners.local import LocalRunner
from tunebench.runners.replay import DEFAULT, ReplayRunner
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.entry import Entry
from tunebench.tuning.neighbours import Hints
from tunebench.tuning.search import Trials, signature
from tunebench.tuning.search_log import SearchLog
from tunebench.tuning.tuner import Options, Progress, Watcher, kernels, sources, tune

OPTIONS = Options(trials=6, time_limit_s=60, threads=2, depth=40, cold_bytes=1 << 15)
PICKED = ("silu_mul", "matmul", "attention")  # of decode, one of each space

pytestmark = [pytest.mark.usefixtures("small_caches"), pytest.mark.xdist_group("timing")]


@pytest.fixture(scope="module")
def found(target: tvm.target.Target, config: Path) -> list[Task]:
    """Three small tasks."""
    of_decode = [task for task in lower(load_model(config, "q0f32"), target)[1] if 1 in task.calls]
    return [next(task for task in of_decode if task.name.startswith(name)) for name in PICKED]


@dataclass
class Times:
    """Made-up times, of 1000 ns for every default, and what was asked for."""

    tuned_ns: int = 500
    stop_after: int = 10**9
    broken: str = ""  # a task whose default fails
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, task: str, program: str) -> Outcome:
        if program == DEFAULT:
            return Died("it crashed") if task == self.broken else Timed(tuple(1000 + i % 3 for i in range(21)))
        return Timed(tuple(self.tuned_ns + i % 3 for i in range(21)))


class Counting(ReplayRunner):
    """A replay runner that counts trials, and may stop the run at one."""

    def __init__(self, times: Times) -> None:
        super().__init__(times)
        self.times = times

    def time(self, trial: Trial, name: str) -> Outcome:
        if sum(self.times.asked.values()) >= self.times.stop_after:
            raise KeyboardInterrupt
        self.times.asked[trial.given.name, name] += 1
        return super().time(trial, name)


def database_of(folder: Path, target: tvm.target.Target) -> Database:
    """What runs left."""
    return Database(folder, provenance(target, cpu_device(), 2))


def run(
    found: list[Task],
    target: tvm.target.Target,
    folder: Path,
    runner: Runner,
    options: Options = OPTIONS,
    watch: Watcher = lambda progress: None,
) -> Progress:
    """One tuning run."""
    return tune(found, database_of(folder, target), target, lambda: runner, options, watch)


def measured(folder: Path, target: tvm.target.Target) -> dict[str, float]:
    """Every trial on disk."""
    return Trials(SearchLog(database_of(folder, target).search_folder)).measured


def test_a_second_run_measures_nothing_twice(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    times = Times()
    first = run(found, target, tmp_path, Counting(times))
    kept = measured(tmp_path, target)
    assert first.trials == first.valid == len(kept) == sum(times.asked.values()) > len(found)
    second = run(found, target, tmp_path, Counting(times))
    assert second.trials == 0
    assert measured(tmp_path, target) == kept
    more = run(found, target, tmp_path, Counting(times), replace(OPTIONS, trials=40))
    assert set(times.asked.values()) == {1}
    assert more.trials + first.trials == sum(times.asked.values()) > first.trials


def test_rounds_that_overlap_are_as_good(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    busy: list[tuple[str, ...]] = []
    times = Times()
    runner = Counting(times)
    runner.builds_ahead = True

    def watch(progress: Progress) -> None:
        busy.append(tuple(search.task.name for search in progress.searches if search.doing == "search"))

    progress = run(found, target, tmp_path, runner, OPTIONS, watch)
    assert progress.trials == progress.valid == len(measured(tmp_path, target)) == sum(times.asked.values())
    assert set(times.asked.values()) == {1}
    assert {name for names in busy for name in names} == {task.name for task in found}
    assert run(found, target, tmp_path, Counting(times)).trials == 0


def test_a_kernel_goes_on_at_the_depth_where_it_was_measured(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    run(found, target, tmp_path, ReplayRunner(Times()))
    more = run(found, target, tmp_path, ReplayRunner(Times()), replace(OPTIONS, trials=8, depth=70))
    assert {search.depth for search in more.searches} == {OPTIONS.depth}
    assert {entry.depth for entry in database_of(tmp_path, target).entries.values()} == {OPTIONS.depth}


def test_what_won_elsewhere_is_tried_and_promoted_before_any_search(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    run(found, target, tmp_path / "there", ReplayRunner(Times()))
    won = database_of(tmp_path / "there", target).promoted()
    assert set(won) == {task.key for task in found}
    stages: list[tuple[str, int]] = []
    progress = tune(
        found,
        database_of(tmp_path / "here", target),
        target,
        lambda: ReplayRunner(Times()),
        replace(OPTIONS, trials=1),
        lambda progress: stages.append((progress.stage, progress.trials)),
        Hints([won]),
    )
    assert progress.trials == len(found)
    assert max(trials for stage, trials in stages if stage == "hints") == len(found)
    here = database_of(tmp_path / "here", target).promoted()
    assert {key: str(record.trace) for key, record in here.items()} == {k: str(r.trace) for k, r in won.items()}


def test_what_won_elsewhere_and_loses_here_is_no_winner(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    run(found, target, tmp_path / "there", ReplayRunner(Times()))
    won = database_of(tmp_path / "there", target).promoted()
    options = replace(OPTIONS, trials=1)
    slower = ReplayRunner(Times(tuned_ns=2000))
    database = database_of(tmp_path / "here", target)
    tune(found, database, target, lambda: slower, options, lambda progress: None, Hints([won]))
    assert database_of(tmp_path / "here", target).promoted() == {}
    decisions = {entry.decision for entry in database_of(tmp_path / "here", target).entries.values()}
    assert decisions == {"kept default"}


def test_a_decision_names_the_space_that_it_was_taken_in(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    """And where an older one stands, as a new search found nothing better, the space of that."""
    today = {task.key: signature(task.mod, target, 2) for task in found}
    assert len(set(today.values())) == len(found)
    run(found, target, tmp_path, ReplayRunner(Times()))
    database = database_of(tmp_path, target)
    assert {key: entry.space for key, entry in database.entries.items()} == today
    won = database.promoted()
    database.open_for_writing()
    database.commit(
        won, {key: msgspec.structs.replace(entry, space="older") for key, entry in database.entries.items()}
    )
    database.close()
    assert run(found, target, tmp_path, ReplayRunner(Times()), replace(OPTIONS, trials=40)).trials > 0
    after = database_of(tmp_path, target)
    assert {key: entry.space for key, entry in after.entries.items()} == today
    assert {key: str(record.trace) for key, record in after.promoted().items()} == {
        key: str(record.trace) for key, record in won.items()
    }


def test_only_the_phase_that_was_asked_for(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    of_prefill, *of_decode = found
    mixed = [replace(of_prefill, calls={16: 3}), *of_decode]
    progress = run(mixed, target, tmp_path, ReplayRunner(Times()), replace(OPTIONS, phases=("decode",)))
    assert {search.task.key for search in progress.searches} == {task.key for task in of_decode}
    assert all(point["decode_ns"] > 0 and point["prefill_ns"] == 0 for point in progress.curve)
    assert set(database_of(tmp_path, target).entries) == {task.key for task in of_decode}


def test_an_interrupted_run_goes_on(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    times = Times(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run(found, target, tmp_path, Counting(times))
    left = database_of(tmp_path, target)
    kept = measured(tmp_path, target)
    assert len(kept) == 2
    assert all(entry.default_ns for entry in left.entries.values())
    (begun,) = {key.split()[0] for key in kept}
    decided = {task.key: left.entries[task.key].decision for task in found}
    assert decided == {task.key: "promoted" if task.key == begun else "not searched" for task in found}
    assert set(left.promoted()) == {begun}  # a bench uses it
    times.stop_after = 10**9
    run(found, target, tmp_path, Counting(times))
    assert set(times.asked.values()) == {1}
    assert {entry.decision for entry in database_of(tmp_path, target).entries.values()} == {"promoted"}


@pytest.mark.parametrize("tuned_ns", [500, 2000])
def test_a_kernel_is_decided_as_soon_as_its_search_ends(
    tuned_ns: int, found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    seen: list[tuple[str, int]] = []

    def watch(progress: Progress) -> None:
        on_disk = database_of(tmp_path, target).entries.values()
        seen.append((progress.stage, sum(bool(entry.decision) for entry in on_disk)))

    run(found, target, tmp_path, ReplayRunner(Times(tuned_ns)), OPTIONS, watch)
    assert {decided for stage, decided in seen if stage == "search"} >= {0, 1}


def test_what_is_clearly_better_is_decided_before_its_search_ends(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    times = Times(stop_after=20)  # after a round of 16, in the next one
    decided: list[bool] = []

    def watch(progress: Progress) -> None:
        decided.extend(bool(search.entry.decision) for search in progress.searches if search.trials == 16)

    with pytest.raises(KeyboardInterrupt):
        run(found[1:2], target, tmp_path, Counting(times), replace(OPTIONS, trials=64), watch)
    assert decided[-1]
    assert set(database_of(tmp_path, target).promoted()) == {found[1].key}


def test_what_was_not_decided_is_the_next_runs_first(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    stopped = Breaking(Times())
    stopped.stops = True
    with pytest.raises(KeyboardInterrupt):
        run(found, target, tmp_path, stopped)
    (begun,) = {key.split()[0] for key in measured(tmp_path, target)}
    entry = database_of(tmp_path, target).entries[begun]
    row = next(row for row in kernels(found, {begun: entry}, {}) if row.task == entry.name)
    assert (row.decision, row.reason) == ("", "not judged yet: the run was stopped")
    asked: list[str] = []

    class Noting(ReplayRunner):
        def compare(self, given: MeasureInput, *args: Any, **named: Any) -> dict[str, Outcome]:
            asked.append("compare")
            return super().compare(given, *args, **named)

        def time(self, trial: Trial, name: str) -> Outcome:
            asked.append("time")
            return super().time(trial, name)

    run(found, target, tmp_path, Noting(Times()), replace(OPTIONS, trials=8))
    assert asked[0] == "compare"
    assert "time" in asked
    assert set(database_of(tmp_path, target).promoted()) == {task.key for task in found}


def test_kernels_that_time_did_not_reach_are_not_searched(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    run(found, target, tmp_path, ReplayRunner(Times()), replace(OPTIONS, time_limit_s=0))
    entries = database_of(tmp_path, target).entries
    assert {(entry.decision, entry.reason) for entry in entries.values()} == {
        ("not searched", "not searched before the run ended")
    }
    run(found, target, tmp_path, ReplayRunner(Times()))
    assert {entry.decision for entry in database_of(tmp_path, target).entries.values()} == {"promoted"}


def test_a_kernel_without_a_space_has_nothing_to_decide(
    found: list[Task], target: tvm.target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not for this one")

    monkeypatch.setattr(ms.TuneContext, "generate_design_space", refuse)
    run(found, target, tmp_path, ReplayRunner(Times()))
    entries = database_of(tmp_path, target).entries.values()
    assert {(entry.decision, entry.reason) for entry in entries} == {
        ("nothing to decide", "no schedule space: not for this one")
    }


def test_kernels_none_of_whose_candidates_runs_keep_their_default(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    runner = ReplayRunner(lambda task, program: Times()(task, program) if program == DEFAULT else Died("it crashed"))
    run(found, target, tmp_path, runner)
    entries = database_of(tmp_path, target).entries.values()
    assert {(entry.decision, entry.reason) for entry in entries} == {
        ("kept default", "no candidate ran and was correct")
    }


@pytest.mark.parametrize(
    ("reason", "decision"),
    [
        ("not searched before the time ran out", "not searched"),
        ("no space is for it", "nothing to decide"),
        ("no schedule space: no loops", "nothing to decide"),
        ("its default schedule failed: it crashed", "not searched"),
        ("no candidate ran and was correct", "kept default"),
    ],
)
def test_older_files_are_read_as_what_was_meant(reason: str, decision: str) -> None:
    old = {"name": "kernel", "default_ns": [3], "decision": "kept default", "reason": reason}
    assert msgspec.convert(old, Entry).decision == decision
    assert msgspec.convert({**old, "tuned_ns": [4]}, Entry).decision == "kept default"


@pytest.mark.parametrize(("tuned_ns", "decision"), [(500, "promoted"), (2000, "kept default")])
def test_a_decision_is_taken_and_says_why(
    tuned_ns: int, decision: str, found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    run(found, target, tmp_path, ReplayRunner(Times(tuned_ns)))
    database = database_of(tmp_path, target)
    assert {entry.decision for entry in database.entries.values()} == {decision}
    assert all(entry.reason for entry in database.entries.values())
    assert set(database.promoted()) == ({task.key for task in found} if decision == "promoted" else set())
    for row in kernels(found, database.entries, sources(database.promoted())):
        assert row.decision == decision
        assert row.schedule == ("tuned" if decision == "promoted" else "default")
        assert stats.median(row.tuned_ns) == pytest.approx(tuned_ns, abs=3)


class Breaking(Counting):
    """A replay runner whose comparisons fail, or stop the run."""

    stops = False

    def compare(self, given: MeasureInput, candidates: Sequence[Candidate], *_: Any, **__: Any) -> dict[str, Outcome]:
        if self.stops:
            raise KeyboardInterrupt
        return {candidate.name: Died("it hung") for candidate in candidates}


def test_a_winner_is_lost_only_to_a_decision(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    run(found, target, tmp_path, ReplayRunner(Times()))
    before = set(database_of(tmp_path, target).promoted())
    assert before == {task.key for task in found}
    better = Times(tuned_ns=300)  # new trials that look better, and cannot be measured again
    assert run(found, target, tmp_path, Breaking(better), replace(OPTIONS, trials=12)).trials > 0
    after = database_of(tmp_path, target)
    assert set(after.promoted()) == before
    assert {entry.decision for entry in after.entries.values()} == {"promoted"}


def test_a_decision_that_was_stopped_is_taken_again(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    stopped = Breaking(Times())
    stopped.stops = True
    with pytest.raises(KeyboardInterrupt):
        run(found, target, tmp_path, stopped)
    assert database_of(tmp_path, target).promoted() == {}
    run(found, target, tmp_path, ReplayRunner(Times()))
    assert set(database_of(tmp_path, target).promoted()) == {task.key for task in found}


def test_a_disk_without_space_ends_the_workers_too(
    found: list[Task], target: tvm.target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Closing(ReplayRunner):
        def close(self) -> None:
            closed.append(True)

    def full(*_: object) -> None:
        raise TuneBenchError("no space is left.")

    monkeypatch.setattr(Database, "commit", full)
    with pytest.raises(TuneBenchError, match="no space"):
        run(found, target, tmp_path, Closing(Times()))
    assert closed == [True]


def test_a_default_that_fails_is_a_reason_not_an_end(
    found: list[Task], target: tvm.target.Target, tmp_path: Path
) -> None:
    broken = found[0]
    run(found, target, tmp_path, ReplayRunner(Times(broken=broken.key)))
    entries = database_of(tmp_path, target).entries
    assert entries[broken.key].decision == "not searched"
    assert "it crashed" in entries[broken.key].reason
    assert {entries[task.key].decision for task in found[1:]} == {"promoted"}


def test_the_local_runner_holds_to_it_too(found: list[Task], target: tvm.target.Target, tmp_path: Path) -> None:
    options = replace(OPTIONS, trials=3)
    progress = run(found, target, tmp_path, LocalRunner(target, 2, 2), options)
    assert progress.valid == progress.trials > 0
    database = database_of(tmp_path, target)
    assert all(entry.decision and entry.default_ns for entry in database.entries.values())
    searched = {search.task.key for search in progress.searches if search.trials}
    assert all(database.entries[key].tuned_ns for key in searched)
    assert set(database.promoted()) == {k for k, e in database.entries.items() if e.decision == "promoted"}
    assert progress.curve[-1]["trials"] == progress.trials
    assert sum(progress.costs.seconds.values()) <= progress.elapsed_s
