"""What a database's folder can do without: trials that failed or are not among the best, old versions, bad lines."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from tunebench import durable, stats, stopping
from tunebench.errors import TuneBenchError
from tunebench.tuning import content, files, records, versions, vetting
from tunebench.tuning.database import Database
from tunebench.tuning.entry import Entry
from tunebench.tuning.lock import FolderLock
from tunebench.tuning.records import RECORDS
from tunebench.tuning.search import FAILED_S


@dataclass(frozen=True)
class Prunable:
    """What may go."""

    paths: tuple[Path, ...]  # old versions, what was no good, and what was left half-written
    trials: tuple[bytes, ...]  # lines of the trials that stay
    dropped: int  # trials that go
    entries: tuple[str, ...]  # keys of those that hold nothing
    freed_bytes: int


def find(folder: Path, keep: int) -> Prunable:
    """What may go of a folder when the best `keep` trials of each kernel stay. TuneBenchError where there is none."""
    found, version = content.read(folder), versions.current(folder)
    search = folder / "search"
    for each in (search, folder / versions.VERSIONS):
        if each.is_symlink():
            raise TuneBenchError(f"{each} leads out of its folder.", "Make it a folder of its own.")
    old = [path for path in versions.all_of(folder) if path != version]
    left = [path for where in (folder, search) for pattern in ("*.bad", "new-*") for path in where.glob(pattern)]
    trials = records.read(search)
    stay = _best(trials, keep)
    before = (search / RECORDS).read_bytes() if RECORDS in trials.digests else b""
    dropped = sum(bool(line) for line in before.split(b"\n")) - len(stay)
    empty = tuple(key for key, entry in found.entries.items() if key not in found.lines and _says_nothing(entry))
    freed = sum(map(_size, [*old, *left])) + (len(before) - len(records.text(stay)) if dropped else 0)
    return Prunable((*old, *sorted(left)), tuple(stay), dropped, empty, freed)


def apply(folder: Path, keep: int) -> Prunable:
    """Drop what `find` finds, with the folder's lock held; promoted records and their decisions stay as they are."""
    entries = find(folder, keep).entries
    if entries:
        _drop_entries(folder, entries)
    try:
        lock = FolderLock(folder)
        try:
            found = find(folder, keep)
            if found.dropped:
                _keep_trials(folder / "search", found.trials)
            for path in found.paths:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        finally:
            lock.release()
    except OSError as error:
        raise durable.refusal(folder, error) from None
    return replace(found, entries=entries)


def _keep_trials(search: Path, trials: tuple[bytes, ...]) -> None:
    """Kernels stay as they are, so that no record's number changes."""
    known = vetting.is_known(records.read(search), search)
    durable.replace(search / RECORDS, records.text(trials))
    if known:
        vetting.remember(records.read(search), search)


def _drop_entries(folder: Path, keys: tuple[str, ...]) -> None:
    database = Database(folder, files.read_provenance(folder))
    database.open_for_writing()
    try:
        with stopping.held():
            stays = {key for key in database.entries if key not in keys or not _says_nothing(database.entries[key])}
            entries = {key: entry for key, entry in database.entries.items() if key in stays}
            database.commit(database.promoted(), entries)
    finally:
        database.close()


def _best(found: records.Lines, keep: int) -> list[bytes]:
    """The lines of the best trials that ran, in their order."""
    by_kernel: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for number, line in found.records.items():
        seconds = stats.median(msgspec.json.decode(line)[1][1] or [FAILED_S])
        if seconds < FAILED_S:
            by_kernel[found.workload_of[number]].append((seconds, number))
    stay = {number for trials in by_kernel.values() for _, number in sorted(trials)[:keep]}
    return [line for number, line in sorted(found.records.items()) if number in stay]


def _says_nothing(entry: Entry) -> bool:
    return not (entry.decision or entry.default_ns or entry.tuned_ns)


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())
    return os.lstat(path).st_size
