"""The local runner against kernels that are wrong, broken, endless or deadly; the timing loop on a made-up clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tvm
from conftest import input_of
from tvm.script import tirx as T

from tunebench import stopping
from tunebench.runners import local
from tunebench.runners import worker as workers
from tunebench.runners.base import Candidate, Died, Failed, NotBuilt, Outcome, Timed, TimedOut, Trial, Wrong
from tunebench.runners.local import LocalRunner
from tunebench.timing import Protocol, interleave

pytestmark = pytest.mark.xdist_group("timing")

ONCE = Protocol(warmups=0, samples=2, least_samples=2)
N = 64


def kernel(kind: str) -> tvm.IRModule:
    """out = 2 a, or something that goes wrong."""

    @T.prim_func(s_tir=True)
    def good(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in range(N):
            with T.sblock("double"):
                v = T.axis.spatial(N, i)
                out[v] = a[v] * T.float32(2)

    @T.prim_func(s_tir=True)
    def wrong(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in range(N):
            with T.sblock("double"):
                v = T.axis.spatial(N, i)
                out[v] = a[v] * T.float32(2.01)

    @T.prim_func(s_tir=True)
    def nan(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in range(N):
            with T.sblock("double"):
                v = T.axis.spatial(N, i)
                out[v] = T.sqrt(a[v] * T.float32(0) - T.float32(1))

    @T.prim_func(s_tir=True)
    def silent(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in range(1):
            with T.sblock("double"):
                v = T.axis.spatial(N, i)
                out[v] = a[v] * T.float32(2)

    @T.prim_func(s_tir=True)
    def missing(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in range(N):
            with T.sblock("double"):
                v = T.axis.spatial(N, i)
                out[v] = T.call_extern("float32", "no_such_function", a[v])

    @T.prim_func(s_tir=True)
    def endless(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for _ in T.serial(T.int64(1 << 40)):
            for i in range(N):
                with T.sblock("double"):
                    v = T.axis.spatial(N, i)
                    out[v] = T.sin(out[v] + a[v])

    @T.prim_func(s_tir=True)
    def deadly(a: T.Buffer((N,), "float32"), out: T.Buffer((N,), "float32")):
        for i in T.serial(T.int64(N)):
            with T.sblock("double"):
                v = T.axis.spatial(T.int64(N), i)
                out[v + T.int64(1 << 50)] = a[v]

    found = {f.__name__: f for f in (good, wrong, nan, silent, missing, endless, deadly)}
    return tvm.IRModule({"main": found[kind].with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})


GIVEN = input_of("double", kernel("good"))


@pytest.fixture(scope="module")
def runner(target: tvm.target.Target) -> Iterator[LocalRunner]:
    made = LocalRunner(target, 2, workers=1)
    yield made
    made.close()


def outcome(runner: LocalRunner, kind: str, limit_ns: int = 10**6) -> Outcome:
    """Build and time one kernel against the good one."""
    trial = Trial(GIVEN, ONCE, limit_ns)
    failed = runner.build(trial, [Candidate(kind, kernel(kind))])
    return failed.get(kind) or runner.time(trial, kind)


def test_a_right_kernel_is_timed(runner: LocalRunner) -> None:
    found = outcome(runner, "good")
    assert isinstance(found, Timed)
    assert len(found.samples_ns) == ONCE.samples
    assert min(found.samples_ns) > 0


@pytest.mark.parametrize("kind", ["wrong", "nan", "silent"])
def test_a_wrong_result_is_rejected(kind: str, runner: LocalRunner) -> None:
    assert isinstance(outcome(runner, kind), Wrong)


def test_outputs_may_be_compared_with_exact_ones(runner: LocalRunner) -> None:
    """The default is wrong here, and does not count."""
    given = replace(input_of("exactly", kernel("wrong")), exact=tvm.ir.save_json(kernel("good")))
    found = {}
    for kind in ("good", "wrong"):
        trial = Trial(given, ONCE, 10**6)
        found[kind] = runner.build(trial, [Candidate(kind, kernel(kind))]).get(kind) or runner.time(trial, kind)
    assert isinstance(found["good"], Timed)
    assert isinstance(found["wrong"], Wrong)


def test_what_does_not_compile_says_so(runner: LocalRunner) -> None:
    found = outcome(runner, "missing")
    assert isinstance(found, NotBuilt | Died)  # the linker in memory may end the process
    assert isinstance(outcome(runner, "good"), Timed)


@pytest.mark.parametrize(("kind", "end"), [("endless", TimedOut), ("deadly", Died)])
def test_a_kernel_that_takes_its_worker_down_costs_itself_only(
    kind: str, end: type[Failed], runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "LEAST_TIMEOUT_S", 1.0)
    assert isinstance(outcome(runner, kind), end)
    assert isinstance(outcome(runner, "good"), Timed)


def test_candidates_that_died_with_their_worker_are_built_again(runner: LocalRunner) -> None:
    trial = Trial(GIVEN, ONCE, 10**6)
    assert runner.build(trial, [Candidate(kind, kernel(kind)) for kind in ("good", "deadly")]) == {}
    assert isinstance(runner.time(trial, "deadly"), Died)
    assert isinstance(runner.time(trial, "good"), Timed)


ORPHAN = """
import time, tvm
from tunebench.runners.local import LocalPrimitives
from tunebench.runners.worker import Process

process = Process(LocalPrimitives, tvm.ir.save_json(tvm.target.Target("llvm")), "cpu", "")
process.send(60, time.sleep, 0)
process.receive()
process.send(60, time.sleep, 60)
print(process._worker._proc.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_ends_with_its_parent_also_when_it_is_at_work() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    assert psutil.wait_procs([worker], timeout=10)[0] == [worker]


def test_modules_in_the_current_folder_are_not_a_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.chdir(tmp_path)
    process = workers.Worker()
    process.send(os.getcwd, (), timeout=60)
    assert process.recv() == str(tmp_path)
    process.kill()
    assert not (tmp_path / "ran").exists()


def test_ctrl_c_is_not_a_workers(runner: LocalRunner) -> None:
    (process,) = runner._workers
    assert process.ask(30, os.getsid, 0) != os.getsid(0)  # a terminal signals its own session only


def interrupt(process: workers.Process, sleep_s: float) -> None:
    """Send a signal to this process while it waits for a worker that sleeps."""
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    with stopping.signals():
        timer.start()
        with pytest.raises(stopping.Stopped):
            process.ask(60, time.sleep, sleep_s)


def test_an_answer_that_a_signal_kept_its_caller_from_is_not_the_next_ones(runner: LocalRunner) -> None:
    (process,) = runner._workers
    before = process.ask(30, os.getpid)
    interrupt(process, sleep_s=1)
    assert process.ask(30, abs, -7) == 7
    assert process.ask(30, os.getpid) == before


def test_a_process_that_goes_on_with_what_nobody_waits_for_is_ended(
    runner: LocalRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "LATE_S", 0.1)
    (process,) = runner._workers
    before = process.ask(30, os.getpid)
    interrupt(process, sleep_s=60)
    assert process.ask(30, os.getpid) != before


def test_a_slow_candidate_is_timed_once(runner: LocalRunner) -> None:
    found = outcome(runner, "good", limit_ns=0)
    assert isinstance(found, Timed)
    assert len(found.samples_ns) == 1


def test_a_comparison_reports_each_arm(runner: LocalRunner) -> None:
    same, off = Candidate("same", kernel("good")), Candidate("off", kernel("wrong"))
    found = runner.compare(GIVEN, [same, off], ONCE)
    assert isinstance(found["off"], Wrong)
    assert {name for name, each in found.items() if isinstance(each, Timed)} == {"same", "default"}
    assert set(runner.compare(GIVEN, [same], ONCE, with_default=False)) == {"same"}


class Made:
    """A clock that only the arms move, and what they did."""

    def __init__(self, **took: int) -> None:
        self.now = 0
        self.calls: list[str] = []
        self.arms: dict[str, Callable[[], None]] = {name: self._arm(name, ns) for name, ns in took.items()}

    def _arm(self, name: str, ns: int) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += ns

        return call

    def clock(self) -> int:
        return self.now


def test_counts_and_warm_ups() -> None:
    made = Made(a=10, b=30)
    taken = interleave(made.arms, Protocol(warmups=2, samples=5), made.clock)
    assert taken["a"].warmup_ns == [10, 10]
    assert taken["a"].samples_ns == [10] * 5
    assert taken["b"].samples_ns == [30] * 5
    assert sorted(made.calls[:4]) == ["a", "a", "b", "b"]


def test_rounds_are_interleaved_in_random_order() -> None:
    made = Made(a=1, b=1, c=1)
    interleave(made.arms, Protocol(warmups=0, samples=40), made.clock)
    rounds = [tuple(made.calls[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) == 6


def test_a_budget_ends_the_slow_arm_only() -> None:
    made = Made(fast=1, slow=10**9)
    taken = interleave(made.arms, Protocol(warmups=1, samples=20, least_samples=3, budget_s=1.5), made.clock)
    assert len(taken["fast"].samples_ns) == 20
    assert len(taken["slow"].samples_ns) == 3


def test_out_of_patience_one_sample_is_enough() -> None:
    made = Made(slow=10**10)
    taken = interleave(
        made.arms, Protocol(warmups=1, samples=20, least_samples=3, budget_s=1.0, patience_s=5.0), made.clock
    )
    assert len(taken["slow"].samples_ns) == 1


def test_a_sample_averages_short_calls() -> None:
    made = Made(short=1000)
    taken = interleave(made.arms, Protocol(warmups=1, samples=4, sample_s=1e-5), made.clock)["short"]
    assert taken.calls == 10
    assert taken.samples_ns == [1000] * 4
    assert len(made.calls) == 1 + 4 * 10
