"""Signals: raised, held, swallowed by TVM; temporary folders of killed processes; a real run that is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tvm_ffi

from tunebench import scratch, stopping
from tunebench.stopping import Stopped

GRACEFUL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
DEAD = 2**22 + 1  # more than Linux gives out


@pytest.mark.parametrize("number", GRACEFUL)
def test_a_signal_is_an_exception_with_its_exit_code(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, stopping.signals():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_still_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_block_that_holds_signals_is_done_first() -> None:
    done = []

    def hold() -> None:
        with stopping.held():
            with stopping.held():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
        done.append("after")

    with stopping.signals(), pytest.raises(Stopped):
        hold()
    assert done == ["inner", "outer"]


def test_what_tvm_makes_of_it_is_known_again() -> None:
    def called_back() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with stopping.signals():
        with pytest.raises(RuntimeError) as caught:
            tvm_ffi.convert(called_back)()
        with pytest.raises(Stopped):
            stopping.check()
        stop = stopping.asked_by(caught.value)
        assert isinstance(stop, Stopped)
        assert stop.number == signal.SIGTERM
        stopping.check()  # once is enough
        assert stopping.asked_by(RuntimeError("another")) is None


def test_the_innermost_block_says_what_is_kept() -> None:
    with pytest.raises(Stopped) as caught, stopping.keeping("outer"), stopping.keeping("inner"):
        raise Stopped(signal.SIGTERM)
    assert caught.value.kept == "inner"


def test_temporary_files_are_in_one_folder_and_go_with_it() -> None:
    with scratch.folder() as folder:
        asked = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
        made = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
        assert made.parent == folder
        assert folder.name.startswith(f"tunebench-{os.getpid()}-")
    assert not folder.exists()


def test_folders_of_killed_processes_go(tmp_path: Path) -> None:
    names = {"dead": f"tunebench-{DEAD}-a", "held": f"tunebench-{DEAD}-b", "live": f"tunebench-{os.getpid()}-c"}
    for name in (*names.values(), "tunebench-browser-x", "other"):
        (tmp_path / name / "inner").mkdir(parents=True)
    lock = scratch._lock(tmp_path / names["held"])  # by a process of another container, whose number says nothing here
    assert lock is not None
    scratch.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names["held"], names["live"], "tunebench-browser-x", "other"}
    os.close(lock)
    scratch.sweep(tmp_path)
    assert not (tmp_path / names["held"]).exists()


@pytest.mark.parametrize("number", GRACEFUL)
def test_a_run_that_is_ended_is_whole(number: int, config: Path, tmp_path: Path) -> None:
    temporary, work = tmp_path / "tmp", tmp_path / "work"
    temporary.mkdir()
    command = [sys.executable, "-m", "tunebench", "tune", "-m", str(config), "-q", "q0f32", "--prompt", "32"]
    command += ["--context", "128", "--time-limit", "10m", "--no-bench", "--work-dir", str(work)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(temporary)}, start_new_session=True,
    ) as run:  # fmt: skip
        while not _trials(work) and run.poll() is None:
            time.sleep(0.05)
        os.killpg(run.pid, number)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + number, output
    last = " ".join(output[output.index("Stopped.") :].split())
    assert last.startswith("Stopped. Trials and decisions so far are in ")
    assert last.endswith("run the same command to go on.")
    assert list(temporary.iterdir()) == []
    assert _trials(work) > 0
    (verdicts,) = work.glob("tuning_logs/*/promoted/verdicts.json")
    decisions = {entry.get("decision", "") for entry in json.loads(verdicts.read_text()).values()}
    assert "not searched" in decisions
    (row,) = (work / "reports/local/results.jsonl").read_text().splitlines()
    assert json.loads(row)["trials"] == _trials(work)


def _trials(work: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in work.glob("tuning_logs/*/search/*tuning_record.json"))


@pytest.mark.slow
def test_a_run_that_is_killed_is_whole(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks/kill_tune.py"
    done = subprocess.run([sys.executable, script, "--n", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| workers left |" in done.stdout
