"""Tuning databases with provenance: what was tried, and the winners alone.

A folder `tuning_logs/<target>-<device>` holds
  promoted                                              link to the current of versions/<n>, which plain TVM can open:
    database_workload.json, database_tuning_record.json   MetaSchedule's two files with the promoted records only
    tunebench/                                            the same two with those that need TuneBench to be applied
    verdicts.json                                         every task's decision, keyed as the records are
  provenance.json                                       what they were made with and for
  search/                                               every trial, the cost model: what a later run goes on from
  .lock                                                 who writes at the moment
  *.bad                                                 lines that were no good
Where there is no `promoted`, the folder itself is the version, and may have all records in its two files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import tvm
from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench import durable
from tunebench.compile.tasks import task_key
from tunebench.errors import TuneBenchError
from tunebench.tuning import content, records, versions, vetting
from tunebench.tuning.entry import LOST_RECORD, Entry, Provenance
from tunebench.tuning.files import OURS, PROVENANCE, VERDICTS, Verdicts, is_begun, is_filled, read_provenance
from tunebench.tuning.lock import FolderLock
from tunebench.tuning.records import FILES, Lines
from tunebench.tuning.search_log import SearchLog

PROTOCOL = "1: cold caches, interleaved, outputs compared with the default's, fresh samples for the verdict"
"""As committed databases say it."""
Text = tuple[ms.database.TuningRecord, bytes, bytes]  # with the lines of its kernel and its own


def provenance(target: tvm.target.Target, device: str, threads: int) -> Provenance:
    """For this device and this TVM."""
    model = next((str(target.attrs[name]) for name in ("mcpu", "arch") if name in target.attrs), "")
    return Provenance(f"{target.kind.name} {model}".strip(), device, threads, tvm.__version__, PROTOCOL)


class Database:
    """One folder's database. Until that folder holds anything, `packed` is read, if it was made for the very same.

    A reader has the version that was current when it was made, whole, whatever a writer does beside it.
    """

    def __init__(self, folder: Path, made: Provenance, packed: Path | None = None) -> None:
        self.folder, self.made = folder, made
        _verify(folder, made)
        self.source = packed if packed and not is_filled(folder) and _is_for(packed, made) else folder
        self.search_folder = folder / "search"
        self.cost_model_path = self.search_folder / "cost_model.npy"
        self._lock: FolderLock | None = None
        self._log: SearchLog | None = None
        self._read()

    def _read(self) -> None:
        _verify(self.source, self.made)
        self._promoted: dict[str, ms.database.TuningRecord] | None = None
        self._texts: dict[str, Text] = {}
        while True:
            version = versions.current(self.source)
            self._parts = [records.read(version), records.read(version / OURS)]
            self._verdicts = Verdicts(version / VERDICTS)
            if versions.current(self.source) == version:
                break  # else a writer may have removed it meanwhile
        self.entries = self._verdicts.entries

    @property
    def warnings(self) -> list[str]:
        """What is no good in its files and was left out, a line each; trials only when it was open for writing."""
        found = [warning for part in self._parts for warning in part.warnings] + self._verdicts.warnings
        return found + (self._log.warnings if self._log else [])

    def open_for_writing(self, wait: Callable[[str], None] | None = None) -> SearchLog:
        """Take the folder's lock and give its trials; until `close`, no other process writes.

        Makes the folder, from what is packed where there is such, and sets aside what is no good. TuneBenchError where
        another process has the lock and `wait` is not given, and where nothing can be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, wait)
            self._log = self._prepare()
        except OSError as error:
            self.close()
            raise durable.refusal(self.folder, error) from None
        except BaseException:
            self.close()
            raise
        return self._log

    def _prepare(self) -> SearchLog:
        if is_filled(self.folder):
            self.source = self.folder  # another run made it since this one looked
        self._read()
        for each in (self.search_folder, self.folder / versions.VERSIONS):
            if each.is_symlink():
                raise TuneBenchError(f"{each} leads out of its folder.", "Name another --work-dir.")
        durable.replace(self.folder / PROVENANCE, content.as_json(self.made))
        self._renew()
        self.search_folder.mkdir(exist_ok=True)
        log = SearchLog(self.search_folder)
        records.set_aside(log.found)
        return log

    def _renew(self) -> None:
        """Begin with what is packed, and without what is no good."""
        winners = self.promoted()
        moved = [part.folder / name for part in self._parts for name in part.unreadable] + self._verdicts.unreadable
        bad = [(name, list(part.bad[name].values())) for part in self._parts for name in FILES if part.bad[name]]
        bad += [(VERDICTS, self._verdicts.bad)] if self._verdicts.bad else []
        for path in moved:
            records.move_aside(path, self.folder)
        for name, lines in bad:
            durable.append(self.folder / f"{name}.bad", records.text(lines))
        if bad or moved or self.source != self.folder:
            self._put(winners)

    def close(self) -> None:
        """Let others write."""
        if self._log and self._lock:
            self._log.close()
        if self._lock:
            self._lock.release()
            self._lock = None

    def promoted(self) -> dict[str, ms.database.TuningRecord]:
        """The winning records by task key."""
        if self._promoted is None:
            self._promoted = {key: record for part in self._parts for key, record in self._load(part).items()}
            for key, entry in self.entries.items():
                if entry.decision == "promoted" and key not in self._promoted:
                    self.entries[key] = replace(entry, decision="", reason=LOST_RECORD, tuned_ns=[])
        return dict(self._promoted)

    def _load(self, part: Lines) -> dict[str, ms.database.TuningRecord]:
        home = self._home(part.folder)
        if part.records and self.source == self.folder and not vetting.is_known(part, home):
            vetting.check(part)
            if not part.damaged:
                vetting.remember(part, home)
        found = {}
        for number, record in records.load(part).items():
            key = task_key(record.workload.mod)
            found[key] = record
            self._texts[key] = (record, part.workloads[part.workload_of[number]], part.records[number])
        return found

    def commit(self, winners: Mapping[str, ms.database.TuningRecord], entries: Mapping[str, Entry]) -> None:
        """Make the promoted records exactly `winners`, and the decisions `entries`: both, or on an error neither."""
        self.entries = dict(entries)
        try:
            self._put(winners)
        except OSError as error:
            raise durable.refusal(self.folder, error) from None

    def _put(self, winners: Mapping[str, ms.database.TuningRecord]) -> None:
        texts = {key: self._text(key, record) for key, record in sorted(winners.items())}
        lines = {key: (kernel, line) for key, (_, kernel, line) in texts.items()}
        version = versions.put(self.folder, content.as_files(lines, self.entries))
        for name in (*FILES, VERDICTS):
            (self.folder / name).unlink(missing_ok=True)  # the version that an older TuneBench wrote
        for part in (version, version / OURS):
            vetting.remember(records.read(part), self._home(part))
        self.source, self._texts, self._promoted = self.folder, texts, dict(winners)

    def _text(self, key: str, record: ms.database.TuningRecord) -> Text:
        known = self._texts.get(key)
        if known and known[0].same_as(record):
            return known
        return record, records.workload_line(record.workload), records.record_line(record, 0)

    def _home(self, part: Path) -> Path:
        """A part's name, whichever the version."""
        return self.folder / part.name if part.name == OURS else self.folder


def _is_for(folder: Path, made: Provenance) -> bool:
    try:
        _verify(folder, made)
    except TuneBenchError:
        return False
    return folder.exists()


def _verify(folder: Path, made: Provenance) -> None:
    """Raise a TuneBenchError for the database of another device or compiler, or of one that nothing tells."""
    found = read_provenance(folder) if is_begun(folder) else made
    differences = found.differences(made)
    if differences:
        raise TuneBenchError(
            f"the database in {folder} was made with another {differences}.",
            "Its records would not hold here: name another --work-dir, or move that folder away and tune again.",
        )
