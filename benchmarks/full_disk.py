"""Runs commands on a disk that is full, or fills up meanwhile, and says what they did and what was lost.

    sudo python benchmarks/full_disk.py

Each command runs in a work dir on a tmpfs of its own with so much space left, once from nothing and once on what a run
with enough space left there. It must end with one line that says so and exit code 1, or with its work done, and what
was there before must be there whole. Prints a table; exit code 1 where there is a fault. Mounting takes root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunebench import results
from tunebench.kernels import int8_dot
from tunebench.tuning import records
from tunebench.tuning.database import Database, read_provenance

MODEL = ("-m", "demo", "-q", "q0f32")
TUNE = ("tune", *MODEL, "--prompt", "16", "--context", "256", "--no-bench", "--time-limit")
COMMANDS = {
    "tune": (*TUNE, "30s"),
    "bench": ("bench", *MODEL, "-p", "0", "-n", "4", "-r", "2", "--context", "256"),
    "import": ("import", "rows.jsonl"),
    "report": ("report",),
}
LEFT = (0, 16, 64, 256)  # KiB
SIZE_KIB = 64 << 10
ROW = {
    "model_type": "x 7B Q4_0",
    "n_prompt": 512,
    "n_gen": 0,
    "samples_ns": [10**9] * 50,
    "avg_ts": 1.0,
    "backends": "CPU",
}
SAYS = ("no space left", "No space left")


@contextmanager
def disk() -> Iterator[Path]:
    """An empty one, in memory."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def fill(where: Path, left_kib: int) -> None:
    """Leave so much."""
    free = os.statvfs(where).f_bavail * os.statvfs(where).f_frsize
    with (where / "ballast").open("wb") as file:
        file.write(b"x" * max(0, free - (left_kib << 10)))


def run(work: Path, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """A command in a work dir, in the folder of the imported file."""
    command = [sys.executable, "-m", "tunebench", *words, "--work-dir", str(work)]
    return subprocess.run(command, capture_output=True, text=True, cwd=work.parent, check=False)


def state(work: Path) -> tuple[set[tuple[str, bytes]], list[str], int]:
    """What is kept: promoted records with their decisions, what a reader warns of, and the number of rows."""
    kept: set[tuple[str, bytes]] = set()
    warnings: list[str] = []
    for folder in work.glob("tuning_logs/*"):
        if (folder / "promoted").exists():
            database = Database(folder, read_provenance(folder))
            kept |= {(key, records.record_line(record, 0)) for key, record in database.promoted().items()}
            warnings += database.warnings
    path = work / "reports/local/results.jsonl"
    rows, torn = results.read(path) if path.exists() else ([], [])
    return kept, warnings + torn, len(rows)


def check(name: str, left_kib: int, before: Path | None) -> tuple[str, ...]:
    """One row of the table; its last word is ok or the fault."""
    with disk() as where:
        work = where / "work"
        (where / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        if before:
            shutil.copytree(before, work, symlinks=True)
        kept, _, rows = state(work)
        fill(where, left_kib)
        done = run(work, COMMANDS[name])
        now, warnings, rows_now = state(work)
        lines = (done.stdout + done.stderr).strip().splitlines()
    said = lines[-1] if lines else ""
    faults = [
        *(["traceback"] if "Traceback" in done.stdout + done.stderr else []),
        *([f"exit code {done.returncode}"] if done.returncode not in (0, 1) else []),
        *(["not one line that says so"] if done.returncode and not any(each in said for each in SAYS) else []),
        *(["damaged: " + warnings[0]] if warnings else []),
        *(["lost"] if (kept and not now) or rows_now < rows else []),
    ]
    start = "some" if before else "none"
    return (
        name,
        start,
        str(left_kib),
        str(done.returncode),
        f"{len(kept)} -> {len(now)}",
        f"{rows} -> {rows_now}",
        "; ".join(faults) or "ok",
    )


def main() -> None:
    """Every command, from nothing and from something, with each amount left."""
    if not hasattr(os, "geteuid") or os.geteuid():
        sys.exit("mounting a disk takes root: sudo python benchmarks/full_disk.py")
    int8_dot.register()  # promoted records name its intrinsics
    print("| command | before | KiB left | exit code | promoted | rows | |\n" + "|---" * 7 + "|")
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name) / "work"
        run(work, (*TUNE, "60s"))
        run(work, COMMANDS["bench"])
        for command in COMMANDS:
            for before in (None, work):
                for left in LEFT if before or command != "report" else ():
                    found = check(command, left, before)
                    bad += found[-1] != "ok"
                    print("| " + " | ".join(found) + " |", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
