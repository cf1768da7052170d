"""MetaSchedule's two files as lines: read and checked one by one, so that a bad line costs that line, and made again.

`database_workload.json` has a kernel a line; a line of `database_tuning_record.json` begins with the number, from 0, of
its kernel's line. TVM's own reader takes nothing or everything, and trusts what it takes.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api

from tunebench import durable, stored
from tunebench.errors import brief, one_line
from tunebench.kernels import int8_dot
from tunebench.tuning import files, shape

WORKLOADS, RECORDS = FILES = files.FILES
MOST_BYTES = files.MOST_BYTES
LONGEST_LINE = 32 << 20
SHOWN = 3  # warnings of one file; the others are counted


@dataclass
class Lines:
    """The good lines of a folder's two files, by line number from 0, and why each other one is bad."""

    folder: Path
    workloads: dict[int, bytes] = field(default_factory=dict)
    records: dict[int, bytes] = field(default_factory=dict)
    workload_of: dict[int, int] = field(default_factory=dict)  # a record's
    bad: dict[str, dict[int, bytes]] = field(default_factory=lambda: {name: {} for name in FILES})
    unreadable: list[str] = field(default_factory=list)  # files
    unended: list[str] = field(default_factory=list)  # files whose last line lacks its end
    digests: dict[str, tuple[int, str]] = field(default_factory=dict)  # bytes and SHA-256 of the files that were read
    reasons: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in FILES})

    @property
    def warnings(self) -> list[str]:
        """One for each bad line, the first few of a file."""
        shown = []
        for name, reasons in self.reasons.items():
            more = len(reasons) - SHOWN
            shown += reasons[:SHOWN] + ([f"{self.folder / name}: {more} more lines are left out."] if more > 0 else [])
        return shown

    @property
    def damaged(self) -> bool:
        """Whether anything was left out."""
        return any(self.reasons.values())

    def refuse(self, name: str, number: int, reason: str) -> None:
        """Leave a line out from now on; with a kernel, the records of it."""
        lines = self.workloads if name == WORKLOADS else self.records
        self.bad[name][number] = lines.pop(number)
        self.reasons[name].append(f"{self.folder / name}, line {number + 1}: {reason}; it is left out.")
        if name == WORKLOADS:
            for record in [each for each, workload in self.workload_of.items() if workload == number]:
                if record in self.records:
                    self.refuse(RECORDS, record, f"its kernel, line {number + 1} of {WORKLOADS}, is no good")


def read(folder: Path) -> Lines:
    """What a folder's two files hold; nothing where there are none. Whatever they hold, this does not raise."""
    found = Lines(folder)
    found.workloads, found.records = (_split(found, name) for name in FILES)
    for number, line in _now(found.workloads):
        _try(found, WORKLOADS, number, shape.check_workload, line)
    for number, line in _now(found.records):
        workload = _try(found, RECORDS, number, shape.check_record, line)
        if workload in found.workloads:
            found.workload_of[number] = workload
        elif workload is not None:
            found.refuse(RECORDS, number, f"its kernel, line {workload + 1} of {WORKLOADS}, is not there")
    return found


def _split(found: Lines, name: str) -> dict[int, bytes]:
    path = found.folder / name
    try:
        if not os.path.lexists(path):
            return {}
        data = stored.read_bytes(path, MOST_BYTES, links=False)
    except (OSError, ValueError) as error:
        found.unreadable.append(name)
        found.reasons[name].append(f"cannot read {path} ({one_line(str(error))}); it is left out.")
        return {}
    found.digests[name] = (len(data), hashlib.sha256(data).hexdigest())
    *lines, rest = data.split(b"\n")
    if rest:
        found.unended.append(name)
    return dict(enumerate(lines + [rest] * bool(rest)))


def _try(found: Lines, name: str, number: int, check: Callable[[bytes], Any], line: bytes) -> Any:
    try:
        if len(line) > LONGEST_LINE:
            raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
        return check(line)
    except Exception as error:  # of TVM's there are many kinds
        found.refuse(name, number, one_line(str(error))[:200] if type(error) is ValueError else brief(error))
    return None


def _now(lines: dict[int, bytes]) -> list[tuple[int, bytes]]:
    return list(lines.items())


def set_aside(found: Lines) -> None:
    """Move the bad lines of both files to `<name>.bad` beside them, and end the last. OSError where that fails.

    A kernel's line is replaced by another kernel's, so that no record's number changes: whenever this is interrupted,
    what is there is good or bad as it was before.
    """
    for name in found.unreadable:
        move_aside(found.folder / name, found.folder)
    for name in found.unended:
        durable.append(found.folder / name, b"\n")
    for name, bad in found.bad.items():
        if bad:
            durable.append(found.folder / f"{name}.bad", b"".join(line + b"\n" for line in bad.values()))
    kept = [line for _, line in sorted(found.records.items())]
    if found.bad[RECORDS]:
        durable.replace(found.folder / RECORDS, text(kept))
    if found.bad[WORKLOADS]:
        last = max(found.workloads, default=-1)
        stand_in = next(iter(found.workloads.values()), b"")
        durable.replace(found.folder / WORKLOADS, text(found.workloads.get(i, stand_in) for i in range(last + 1)))


def move_aside(path: Path, folder: Path) -> None:
    """Rename what cannot be read as a file to a name that is free in `folder`."""
    names = (folder / f"{path.name}.{number}.bad" for number in itertools.count(1))
    path.rename(next(each for each in names if not each.exists()))


def text(lines: Iterable[bytes]) -> bytes:
    """Lines as a file."""
    return b"".join(line + b"\n" for line in lines)


# -- as TVM's objects ---------------------------------------------------------------------------------------


def load(found: Lines) -> dict[int, ms.database.TuningRecord]:
    """Every good record by line number. What TVM refuses is refused in `found`."""
    int8_dot.register()
    workloads = {number: _try(found, WORKLOADS, number, parse_workload, line) for number, line in _now(found.workloads)}
    loaded = {}
    for number, line in _now(found.records):
        workload = workloads[found.workload_of[number]]
        loaded[number] = _try(found, RECORDS, number, functools.partial(parse_record, workload=workload), line)
    return {number: loaded[number] for number in found.records}


def parse_workload(line: bytes | str) -> ms.database.Workload:
    """A line that was checked, as TVM's object. What TVM raises varies."""
    return ms.database.Workload.from_json(msgspec.json.decode(line))


def parse_record(line: bytes | str, workload: ms.database.Workload) -> ms.database.TuningRecord:
    """The same of a record; the intrinsics of `int8_dot` must be registered."""
    return ms.database.TuningRecord.from_json(msgspec.json.decode(line)[1], workload)


def workload_line(workload: ms.database.Workload) -> bytes:
    """A kernel as a line."""
    return msgspec.json.encode(_plain(_ffi_api.WorkloadAsJSON(workload)))


def record_line(record: ms.database.TuningRecord, workload: int) -> bytes:
    """A record as a line, of the kernel on that line."""
    return msgspec.json.encode([workload, _plain(_ffi_api.TuningRecordAsJSON(record))])


def needs_tunebench(record: bytes) -> bool:
    """Whether a record's line names an intrinsic or a template of TuneBench's, so that plain TVM cannot apply it."""
    return any(
        isinstance(value, str) and value.startswith(shape.OURS)
        for _, _, attributes, _ in msgspec.json.decode(record)[1][0][0]
        for value in attributes
    )


def _plain(value: Any) -> Any:
    """What TVM gives as JSON, in Python's own types; an object among it is written as TVM itself would."""
    if value is None or isinstance(value, bool):
        return value
    for kind, also in ((int, tvm.tirx.IntImm), (float, tvm.tirx.FloatImm), (str, str)):
        if isinstance(value, kind | also):
            return kind(value)
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | tvm.ir.Array):
        return [_plain(each) for each in value]
    return str(tvm.ir.save_json(value))
