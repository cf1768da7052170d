"""A database's folder as its files say, read without TVM: what it is for, its decisions, what it holds at a glance."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from tunebench import environment, stored
from tunebench.errors import TuneBenchError, one_line
from tunebench.tuning import versions
from tunebench.tuning.entry import Entry, Provenance

FILES = ("database_workload.json", "database_tuning_record.json")  # of MetaSchedule
OURS = "tunebench"  # in a version, the records that plain TVM cannot apply
VERDICTS = "verdicts.json"
PROVENANCE = "provenance.json"
MOST_BYTES = 256 << 20  # of a file


def folder_name(target_name: str, made: Provenance) -> str:
    """`<target>-<device>`, as one folder name, with the threads of a CPU."""
    threads = f"-{made.threads}t" if made.threads else ""
    return f"{target_name}-{environment.device_slug(made.device)}{threads}"


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a database, or a part of one."""
    names = (*FILES, VERDICTS, PROVENANCE, versions.LINK, versions.VERSIONS, "search")
    return any(os.path.exists(folder / name) for name in names)  # also False where it is too long for a path


def is_filled(folder: Path) -> bool:
    """Whether a first version was finished, so that what is packed counts no more."""
    return any(os.path.lexists(folder / name) for name in (*FILES, VERDICTS, versions.LINK))


def read_provenance(folder: Path) -> Provenance:
    """What a folder's database was made for. TuneBenchError where there is none, or where nothing tells."""
    path = folder / PROVENANCE
    try:
        return msgspec.json.decode(_limited(path), type=Provenance)
    except FileNotFoundError:
        raise TuneBenchError(
            f"{path} is missing, so nobody knows what the database was made for.",
            "Put it back, name another --work-dir, or move that folder away and tune again.",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise TuneBenchError(
            f"cannot read {path} ({one_line(str(error))}).",
            "Name another --work-dir, or move that folder away and tune again.",
        ) from None


class Verdicts:
    """The decisions of a version's file; what does not fit is in `bad`, and why in `warnings`."""

    def __init__(self, path: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self.bad: list[bytes] = []
        self.unreadable: list[Path] = []
        self.warnings: list[str] = []
        try:
            found = msgspec.json.decode(_limited(path), type=dict[str, msgspec.Raw])
        except FileNotFoundError:
            return
        except (OSError, ValueError, RecursionError) as error:
            self.unreadable.append(path)
            self.warnings.append(f"cannot read {path} ({one_line(str(error))}); it is left out.")
            return
        bad = {key: each for key, each in found.items() if not self._take(path, key, each)}
        self.bad = [msgspec.json.encode(bad)] if bad else []

    def _take(self, path: Path, key: str, given: msgspec.Raw) -> bool:
        try:
            self.entries[key] = msgspec.json.decode(given, type=Entry)
        except (ValueError, RecursionError) as error:
            self.warnings.append(f"{path}, task {key[:40]}: {one_line(str(error))}; it is left out.")
            return False
        return True


def _limited(path: Path) -> bytes:
    """A file's contents. OSError or ValueError where it is a link, or too large to be one of these."""
    return stored.read_bytes(path, MOST_BYTES, links=False)


@dataclass(frozen=True)
class Glance:
    """What a folder holds, at a glance: no line of its records is looked into."""

    folder: Path
    made: Provenance | None  # None where nothing tells
    entries: dict[str, Entry]
    records: int  # promoted
    changed: datetime  # last
    warnings: list[str]

    @property
    def decisions(self) -> Counter[str]:
        """How many kernels have which."""
        return Counter(entry.decision for entry in self.entries.values())

    @property
    def chunks(self) -> list[int]:
        """Sizes of the chunks that its kernels were tuned for; none in databases of before."""
        return sorted({size for entry in self.entries.values() for size in entry.chunks})

    @property
    def target_name(self) -> str:
        """The target that the folder is named for; empty where its name is another."""
        suffix = folder_name("", self.made) if self.made else ""
        return self.folder.name.removesuffix(suffix) if suffix and self.folder.name.endswith(suffix) else ""


def glance(folder: Path) -> Glance:
    """Look at a folder; TuneBenchError where there is no database."""
    if not is_begun(folder):
        raise TuneBenchError(f"there is no database in {folder}.", "`tunebench db ls` shows where there are some.")
    warnings, made = [], None
    try:
        made = read_provenance(folder)
    except TuneBenchError as error:
        warnings.append(error.message)
    try:
        version = versions.current(folder)
    except TuneBenchError as error:
        return Glance(folder, made, {}, 0, _changed(folder), [*warnings, error.message])
    while True:
        verdicts = Verdicts(version / VERDICTS)
        records = sum(_lines(part / FILES[1]) for part in (version, version / OURS))
        before, version = version, versions.current(folder)
        if before == version:
            break  # else a writer may have removed it meanwhile
    promoted = sum(entry.decision == "promoted" for entry in verdicts.entries.values())
    if promoted != records:
        warnings.append(f"{version} has {records} records, and {promoted} kernels are said to be promoted.")
    warnings += [f"{path} has what was no good." for path in sorted(folder.glob("*.bad"))]
    return Glance(folder, made, verdicts.entries, records, _changed(version), warnings + verdicts.warnings)


def databases(root: Path) -> Iterator[Path]:
    """The folders of a folder of databases that hold one."""
    if os.path.isdir(root):
        yield from (path for path in sorted(root.glob("*")) if path.is_dir() and is_begun(path))


def _lines(path: Path) -> int:
    try:
        return sum(bool(line.strip()) for line in _limited(path).split(b"\n"))
    except (OSError, ValueError):
        return 0


def _changed(folder: Path) -> datetime:
    times = [
        path.stat().st_mtime
        for path in (folder, folder / VERDICTS, *(folder / name for name in FILES))
        if path.exists()
    ]
    return datetime.fromtimestamp(max(times, default=0), timezone.utc)
