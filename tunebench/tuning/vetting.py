"""Lines that this machine did not write are parsed and applied in another process first, which they may crash.

What passed, or was written here, is remembered outside the folder: the length and the SHA-256 of each file's beginning.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
from tvm.s_tir import meta_schedule as ms

from tunebench import durable, installation
from tunebench.compile.tasks import replay
from tunebench.errors import brief
from tunebench.kernels import int8_dot
from tunebench.tuning import records
from tunebench.tuning.records import FILES, RECORDS, WORKLOADS, Lines

TIMEOUT_S = 300.0
LINE_S = 20  # of a processor, for one line
MEMORY_BYTES = 16 << 30
MOST_CRASHES = 8  # before the rest is refused unseen


def _cache() -> Path:
    """The user's own folder for what can be found out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunebench" / "checked"


def remember(found: Lines, home: Path) -> None:
    """Trust these lines, which this process wrote or saw pass, in the folder `home`."""
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        durable.replace(_note(home), msgspec.json.encode(found.digests))
    except OSError:
        pass  # they will be checked again


def is_known(found: Lines, home: Path) -> bool:
    """Whether both files are as they were remembered for `home`."""
    try:
        known = msgspec.json.decode(_note(home).read_bytes(), type=dict[str, tuple[int, str]])
    except (OSError, ValueError):
        return False
    return known == found.digests


def _note(home: Path) -> Path:
    return _cache() / hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:32]


def check(found: Lines) -> None:
    """Refuse the lines that another process could not parse, or not apply; it is started again where it crashed."""
    for _ in range(MOST_CRASHES):
        at, left = _try_all(found)
        if not left:
            return
        if at:
            found.refuse(*at, "TVM crashed on it")
    for number in list(found.records):
        found.refuse(RECORDS, number, "TVM crashed on too many lines of this file")


def _try_all(found: Lines) -> tuple[tuple[str, int] | None, bool]:
    """Refuse what the other process says; also the line that it died on, if it did, and whether it died at all."""
    lines = {name: [[n, line.decode()] for n, line in given.items()] for name, given in _both(found).items()}
    try:
        ended = subprocess.run(
            installation.python("from tunebench.tuning import vetting; vetting.main()"),
            input=json.dumps([lines, found.workload_of]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S + LINE_S * sum(map(len, lines.values())),  # each line has a limit of its own
        )
        output, died = ended.stdout, ended.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, died = error.stdout or b"", True
    at: tuple[str, int] | None = None
    for line in output.decode(errors="replace").splitlines():
        name, number, said = line.split(" ", 2)
        at = (name, int(number)) if said == "begins" else None
        if said not in ("begins", "passed") and int(number) in _both(found)[name]:
            found.refuse(name, int(number), said)
    return at, died


def _both(found: Lines) -> dict[str, dict[int, bytes]]:
    return {WORKLOADS: found.workloads, RECORDS: found.records}


# -- in the other process -----------------------------------------------------------------------------------


def main() -> None:
    """Parse the workloads of standard input and apply the records, saying before and after each how it went."""
    lines, workload_of = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.dup2(2, 1)  # what TVM prints is not said
    int8_dot.register()
    workloads: dict[int, ms.database.Workload] = {}
    for kind, number, line in [(name, *each) for name in FILES for each in lines[name]]:
        os.write(out, f"{kind} {number} begins\n".encode())
        _limit()
        try:
            if kind == WORKLOADS:
                workloads[number] = records.parse_workload(line)
            elif workload := workloads.get(workload_of[str(number)]):
                replay(workload.mod, records.parse_record(line, workload))
            said = "passed"
        except Exception as error:  # whatever TVM raises
            said = brief(error)
        os.write(out, f"{kind} {number} {said}\n".encode())


def _limit() -> None:
    """Let the next line take so much time and memory."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    for limit, most in (
        (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + LINE_S),
        (resource.RLIMIT_AS, MEMORY_BYTES),
    ):
        resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
