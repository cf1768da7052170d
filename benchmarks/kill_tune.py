"""Kills a tuning run again and again, by any signal at any moment, and counts what is broken afterwards.

    python benchmarks/kill_tune.py --n 100
    python benchmarks/kill_tune.py --n 30 --promoting

Runs go on in one work dir, which is emptied now and then. A signal comes at a random time, or just after a file of the
database has changed, at times to the whole process group, at times twice. After each kill the database must open, its
promoted records and verdicts must agree, no trial may be lost or belong to another kernel, no worker process may be
left after some seconds, and no temporary folder after the next run. With --promoting each run begins with trials that
nothing was decided on, and is killed while it keeps one of its first decisions. Prints a table; exit code 1 where there
is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from tunebench.kernels import int8_dot
from tunebench.tuning.database import Database
from tunebench.tuning.entry import Provenance
from tunebench.tuning.versions import LINK, VERSIONS

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "SIGQUIT")
GRACEFUL = ("SIGINT", "SIGTERM", "SIGHUP")
FAULTS = ("exit code", "database", "verdicts", "trials lost", "workers left", "folders left")
EMPTY_EVERY = 10  # kills
LATEST_S = 20.0  # after the start
ENDS_WITHIN_S = 60.0  # of the signal: seconds of grace, and closing, on a busy machine
WORKERS_WITHIN_S = 5.0
UNDECIDED_S = 60  # of search, for the trials that --promoting begins with
DECISIONS = 5  # that are kept before one with --promoting, at most
PROMOTES_WITHIN_S = 90.0  # of its start: a run that does not is killed then
TUNE = ("tune", "-m", "demo", "-q", "q0f32", "--time-limit", "10m", "--no-bench")


@dataclass
class Killer:
    """Runs in one work dir, and what they left."""

    folder: Path
    rng: random.Random
    undecided: Path | None = None  # a work dir with trials alone, from which each run begins
    trials: Counter[tuple[str, str]] = field(default_factory=Counter)  # the last run's, as (kernel, schedule)
    faults: dict[str, Counter[str]] = field(default_factory=dict)  # by signal
    met: int = 0  # runs that were writing a version when they were killed, or just had

    @property
    def work(self) -> Path:
        """What runs share."""
        return self.folder / "work"

    @property
    def temporary(self) -> Path:
        """Where runs have their temporary files."""
        return self.folder / "tmp"

    def kill_one(self, index: int) -> list[str]:
        """Start a run, kill it, look at what is left; the faults."""
        if index % EMPTY_EVERY == 0 or self.undecided:
            shutil.rmtree(self.work, ignore_errors=True)
            if self.undecided:
                shutil.copytree(self.undecided, self.work)
            self.trials = _trials(self.work)
        self.temporary.mkdir(exist_ok=True)
        name = self.rng.choice(SIGNALS)
        before = {path.name for path in self.temporary.iterdir()}
        run = self._start()
        self._await_moment(run)
        code = self._end(run, getattr(signal, name))
        found = [each for each, wrong in self._checks(run, name, code, before).items() if wrong]
        counts = self.faults.setdefault(name, Counter())
        counts.update(["kills", *found])
        return [f"{index} {name} (exit code {code}): {each}" for each in found]

    def search(self) -> None:
        """Have a run make trials, and forget what it decided."""
        self.temporary.mkdir(exist_ok=True)
        run = self._start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(UNDECIDED_S)
        run.kill()
        run.wait()
        for folder in self.work.glob("tuning_logs/*"):
            (folder / LINK).unlink(missing_ok=True)
            shutil.rmtree(folder / VERSIONS, ignore_errors=True)
        self.undecided = self.work.rename(self.folder / "undecided")

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tunebench", *TUNE, "--work-dir", str(self.work)]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )  # fmt: skip

    def _await_moment(self, run: subprocess.Popen[bytes]) -> None:
        if self.undecided:
            self._await_version(run, self.rng.randint(1, DECISIONS))
            return
        end_s = time.monotonic() + self.rng.uniform(0.3, LATEST_S)
        at_a_write = self.rng.random() < 0.5
        before = self._written()
        while time.monotonic() < (end_s + LATEST_S if at_a_write else end_s) and run.poll() is None:
            if at_a_write and self._written() != before:
                time.sleep(self.rng.uniform(0, 0.02))
                return
            time.sleep(0.002)

    def _await_version(self, run: subprocess.Popen[bytes], number: int) -> None:
        """Wait until a version of the database is being written, and a little longer."""
        end_s = time.monotonic() + PROMOTES_WITHIN_S
        while time.monotonic() < end_s and run.poll() is None:
            if any(self.work.glob(f"tuning_logs/*/{VERSIONS}/{number}")):
                self.met += 1
                time.sleep(self.rng.uniform(0, 0.05))
                return
            time.sleep(0.001)

    def _written(self) -> list[tuple[str, int]]:
        """When the files of the database were last written, without the trials, which are written all the time."""
        names = ("*", f"{VERSIONS}/*", f"{VERSIONS}/*/*")
        found = []
        for path in (path for name in names for path in self.work.glob(f"tuning_logs/*/{name}")):
            with contextlib.suppress(OSError):  # replaced just now
                found += [(str(path), path.lstat().st_mtime_ns)] if path.name != "search" else []
        return sorted(found)

    def _end(self, run: subprocess.Popen[bytes], number: int) -> int:
        """Send the signal, perhaps twice; the exit code."""
        send = os.killpg if self.rng.random() < 0.5 else os.kill
        for _ in range(self.rng.choice((1, 2))):
            with contextlib.suppress(ProcessLookupError):
                send(run.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(self.rng.uniform(0, 3))
        try:
            return run.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            run.kill()
            return run.wait() or 1

    def _checks(self, run: subprocess.Popen[bytes], name: str, code: int, before: set[str]) -> dict[str, bool]:
        number = int(getattr(signal, name))
        kept = _trials(self.work)
        lost, self.trials = self.trials - kept, kept
        database, verdicts = _faults(self.work)
        left = {path.name for path in self.temporary.iterdir()}
        caught = code == 128 + number
        swept = caught or any(name.startswith(f"tunebench-{run.pid}-") for name in left)  # it came as far as that
        return {
            "exit code": not (code == -number or (caught and name in GRACEFUL)),
            "database": database,
            "verdicts": verdicts,
            "trials lost": bool(lost),
            "workers left": _workers_stay(run.pid),
            "folders left": bool(left if caught else swept and left & before),
        }


def _trials(work: Path) -> Counter[tuple[str, str]]:
    """Trials on disk, each with its kernel; a last line that is not whole is none yet."""
    found: Counter[tuple[str, str]] = Counter()
    for folder in work.glob("tuning_logs/*/search"):
        kernels = _lines(folder / "database_workload.json")
        for line in _lines(folder / "database_tuning_record.json"):
            place, record = json.loads(line)
            if place < len(kernels):
                found[json.loads(kernels[place])[0], json.dumps(record[0])] += 1
    return found


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []


def _faults(work: Path) -> tuple[bool, bool]:
    """Whether a database does not open, and whether its promoted records and its verdicts differ."""
    for folder in work.glob("tuning_logs/*"):
        if not (folder / "provenance.json").exists() or folder.name.startswith("new-"):
            continue
        try:
            made = msgspec.json.decode((folder / "provenance.json").read_bytes(), type=Provenance)
            database = Database(folder, made)
            won = set(database.promoted())
        except Exception as error:  # whatever it is, it is a fault
            print(f"  {folder}: {error}")
            return True, False
        if won != {key for key, entry in database.entries.items() if entry.decision == "promoted"}:
            return False, True
    return False, False


def _workers_stay(parent: int) -> bool:
    """Whether workers of a process are there for longer than they may be."""
    end_s = time.monotonic() + WORKERS_WITHIN_S
    while workers := _workers(parent):
        if time.monotonic() > end_s:
            for each in workers:
                each.kill()
            return True
        time.sleep(0.1)
    return False


def _workers(parent: int) -> list[psutil.Process]:
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = each.cmdline()
            if "tunebench.runners import child" in " ".join(words) and str(parent) in words:
                found.append(each)
    return found


def _table(faults: dict[str, Counter[str]]) -> str:
    columns = ("signal", "kills", *FAULTS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, counts in sorted(faults.items()):
        lines.append(f"| {name} | " + " | ".join(str(counts[column]) for column in columns[1:]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Kill as often as was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--n", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--promoting", action="store_true", help="kill runs while they keep decisions")
    given = parser.parse_args()
    for name in SIGNALS:
        if name != "SIGKILL":  # a shell's background job ignores some, and so would the runs
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    int8_dot.register()  # promoted records name its intrinsics
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGQUIT would leave a core
    with tempfile.TemporaryDirectory() as name:
        killer = Killer(Path(name), random.Random(given.seed))
        if given.promoting:
            killer.search()
        for index in range(given.n):
            for fault in killer.kill_one(index):
                print(fault, flush=True)
    print(f"{killer.trials.total()} trials since the work dir was emptied last")
    if given.promoting:
        print(f"{killer.met} of {given.n} runs were killed at a promotion")
    print(_table(killer.faults))
    sys.exit(any(counts[each] for counts in killer.faults.values() for each in FAULTS))


if __name__ == "__main__":
    main()
