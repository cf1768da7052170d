"""Tuning databases with provenance: what was tried, and the winners alone.

A folder `tuning_logs/<target>-<device>` holds
  database_workload.json, database_tuning_record.json   MetaSchedule's two files with the promoted records only
  verdicts.json                                         every task's decision, keyed as the records are
  provenance.json                                       what they were made with and for
  search/                                               every trial, the cost model: what a later run goes on from
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tvm
from msgspec import Struct
from tvm.s_tir import meta_schedule as ms

from tunebench import environment, stored
from tunebench.compile.tasks import task_key
from tunebench.errors import TuneBenchError
from tunebench.spec import Amount, Decision, Schedule, Size

FILES = ("database_workload.json", "database_tuning_record.json")
PROTOCOL = "1: cold caches, interleaved, outputs compared with the default's, fresh samples for the verdict"
"""As committed databases say it."""
Stored = TypeVar("Stored")


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """What a database was made for and with. A database of another kind is refused."""

    target: str
    device: str
    threads: Amount
    tvm: str
    protocol: str


class Entry(Struct, forbid_unknown_fields=True):
    """What is known of one task. A field of a newer writer is refused, as writing the file again would lose it."""

    name: str
    default_ns: list[Amount] = []
    tuned_ns: list[Amount] = []
    by_source: dict[Schedule, list[Amount]] = {}  # the fastest of each, beside `tuned_ns`
    decision: Decision | Literal[""] = ""  # empty: not judged yet
    reason: str = ""
    trial: str = ""  # key of the record that was judged
    depth: Amount = 256  # positions in the cache where it is measured, if it reads one
    chunks: list[Size] = []  # sizes of the chunks that it was tuned for; empty in databases of before
    exhausted: str = ""  # revision of the spaces in which no candidate is left


def provenance(target: tvm.target.Target, device: str, threads: int) -> Provenance:
    """For this device and this TVM."""
    model = next((str(target.attrs[name]) for name in ("mcpu", "arch") if name in target.attrs), "")
    return Provenance(f"{target.kind.name} {model}".strip(), device, threads, tvm.__version__, PROTOCOL)


def folder_name(target_name: str, made: Provenance) -> str:
    """`<target>-<device>`, as one folder name, with the threads of a CPU."""
    threads = f"-{made.threads}t" if made.threads else ""
    return f"{target_name}-{environment.device_slug(made.device)}{threads}"


class Database:
    """One folder's database. Until there is that folder, `packed` is read, if it was made for the very same."""

    def __init__(self, folder: Path, made: Provenance, packed: Path | None = None) -> None:
        self.folder = folder
        self.source = packed if packed and _is_for(packed, made) and not folder.exists() else folder
        self.made = made
        self.search_folder = folder / "search"
        self.cost_model_path = self.search_folder / "cost_model.tar"
        _verify(folder, made)
        self.entries = _read(self.source / "verdicts.json", dict[str, Entry]) or {}

    def open_search(self) -> ms.database.JSONDatabase:
        """The trials, for appending; makes the folder, from what is packed where there is such."""
        try:
            if self.source != self.folder:
                fresh = self.folder.with_name(f"new-{self.folder.name}")
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.copytree(self.source, fresh, copy_function=shutil.copyfile)
                fresh.replace(self.folder)
                self.source = self.folder
            self.search_folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "provenance.json", self.made)
        except OSError as error:
            raise TuneBenchError(
                f"cannot write to {self.folder} ({error.strerror}).", "Name a folder with --work-dir."
            ) from None
        for name in FILES:
            _cut_torn_line(self.search_folder / name)
        _cut_orphans(*(self.search_folder / name for name in FILES))
        return _open(self.search_folder)

    def promoted(self) -> dict[str, ms.database.TuningRecord]:
        """The winning records by task key."""
        if not all((self.source / name).exists() for name in FILES):
            return {}
        return {task_key(record.workload.mod): record for record in _open(self.source).get_all_tuning_records()}

    def promote(self, winners: dict[str, ms.database.TuningRecord]) -> None:
        """Make the promoted records exactly `winners`."""
        fresh = self.folder / "new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        database = _open(fresh)
        for _, record in sorted(winners.items()):
            workload = database.commit_workload(record.workload.mod)
            database.commit_tuning_record(
                ms.database.TuningRecord(record.trace, workload, record.run_secs, record.target, record.args_info)
            )
        for name in FILES:
            (fresh / name).touch()
            os.replace(fresh / name, self.folder / name)
        fresh.rmdir()

    def save_entries(self) -> None:
        """Keep the decisions, whole or not at all."""
        _write(self.folder / "verdicts.json", dict(sorted(self.entries.items())))


def _open(folder: Path) -> ms.database.JSONDatabase:
    return ms.database.JSONDatabase(work_dir=str(folder), module_equality="structural")


def _write(path: Path, data: Any) -> None:
    fresh = path.with_name(f"new-{path.name}")
    fresh.write_bytes(msgspec.json.format(stored.encode(data), indent=1) + b"\n")
    fresh.replace(path)


def _read(path: Path, kind: type[Stored]) -> Stored | None:
    """What a file holds, None where there is none; a TuneBenchError names the field that does not fit."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind) if path.exists() else None
    except (OSError, ValueError) as error:
        raise TuneBenchError(
            f"cannot read {path} ({error}).", "Name another --work-dir, or move that folder away and tune again."
        ) from None


def _is_for(folder: Path, made: Provenance) -> bool:
    try:
        _verify(folder, made)
    except TuneBenchError:
        return False
    return folder.exists()


def _verify(folder: Path, made: Provenance) -> None:
    found = _read(folder / "provenance.json", Provenance) or made
    pairs = [(name, getattr(found, name), getattr(made, name)) for name in Provenance.__struct_fields__]
    if found != made:
        differences = ", ".join(f"{name} {there!r} (here {here!r})" for name, there, here in pairs if there != here)
        raise TuneBenchError(
            f"the database in {folder} was made with another {differences}.",
            "Its records would not hold here: name another --work-dir, or move that folder away and tune again.",
        )


def _cut_torn_line(path: Path) -> None:
    """Drop a last line that an interrupted run left incomplete."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole, last = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
    try:
        if last:
            json.loads(last)
    except ValueError:
        path.write_bytes(whole)


def _cut_orphans(workloads: Path, records: Path) -> None:
    """Drop records whose workload was lost: a record's line begins with its workload's line number."""
    if not (workloads.exists() and records.exists()):
        return
    count = len(workloads.read_text().splitlines())
    lines = records.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)[0] < count]
    if len(kept) < len(lines):
        records.write_text("".join(kept))
