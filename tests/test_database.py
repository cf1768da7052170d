"""Databases: provenance, promotion, torn lines."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import tvm
from conftest import draw_records, load_model, lower
from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench.compile.build import compile_model
from tunebench.compile.tasks import Task
from tunebench.devices.targets import cpu_device
from tunebench.errors import TuneBenchError
from tunebench.tuning.database import FILES, Database, folder_name, provenance
from tunebench.tuning.entry import Entry, Provenance
from tunebench.tuning.search import Trials, record_key

Records = dict[str, ms.database.TuningRecord]
LOGS = Path(__file__).parent.parent / "tuning_logs"


@pytest.fixture(scope="module")
def model(target: tvm.target.Target, config: Path) -> tuple[tvm.IRModule, list[Task], Records]:
    mod, found = lower(load_model(config, "q4f16_1"), target)
    return mod, found, draw_records(found[:8], target, 0)


@pytest.fixture
def made(target: tvm.target.Target) -> Provenance:
    return provenance(target, cpu_device(), 2)


def written(folder: Path, made: Provenance, records: Records) -> Database:
    """A database with the records as trials and promoted."""
    database = Database(folder, made)
    trials = database.open_search()
    for record in records.values():
        workload = trials.commit_workload(record.workload.mod)
        trials.commit_tuning_record(ms.database.TuningRecord(record.trace, workload, [1e-3], record.target, None))
    database.promote(records)
    return database


def test_promoted_records_come_back_and_apply(
    model: tuple[tvm.IRModule, list[Task], Records], made: Provenance, target: tvm.target.Target, tmp_path: Path
) -> None:
    mod, found, records = model
    written(tmp_path / "db", made, records)
    again = Database(tmp_path / "db", made).promoted()
    assert {key: record_key(record) for key, record in again.items()} == {
        key: record_key(record) for key, record in records.items()
    }
    assert compile_model(mod, target, again).tuned == dict.fromkeys(records, "tuned")
    assert frozenset(records) < {task.key for task in found}


def test_promotion_is_exact(model: tuple[tvm.IRModule, list[Task], Records], made: Provenance, tmp_path: Path) -> None:
    records = model[2]
    database = written(tmp_path / "db", made, records)
    kept = dict(list(records.items())[:3])
    database.promote(kept)
    assert set(Database(tmp_path / "db", made).promoted()) == set(kept)
    database.promote({})
    assert Database(tmp_path / "db", made).promoted() == {}
    assert all((tmp_path / "db" / name).read_text() == "" for name in FILES)
    assert len(Trials(database.open_search()).measured) == len(records)  # the trials stay


def test_an_unused_folder_is_empty_and_stays_away(made: Provenance, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", made)
    assert database.promoted() == {}
    assert database.entries == {}
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("torn", FILES)
def test_a_torn_last_line_is_cut(
    torn: str, model: tuple[tvm.IRModule, list[Task], Records], made: Provenance, tmp_path: Path
) -> None:
    records = model[2]
    database = written(tmp_path / "db", made, records)
    path = database.search_folder / torn
    whole = path.read_bytes()
    last = whole.splitlines()[-1]
    path.write_bytes(whole + last[: len(last) // 2])
    assert len(Trials(database.open_search()).measured) == len(records)
    assert path.read_bytes() == whole
    path.write_bytes(whole[: -len(last) // 2])  # cut within the last line itself
    if torn == FILES[0]:  # a task is written before its first record, so no record of it is there yet
        trials = database.search_folder / FILES[1]
        trials.write_text("".join(line for line in trials.read_text().splitlines(True)[:-1]))
    left = Trials(database.open_search())
    assert len(left.measured) == len(records) - 1
    record = next(iter(records.values()))
    workload = left.records.commit_workload(record.workload.mod)
    left.records.commit_tuning_record(ms.database.TuningRecord(record.trace, workload, [1.0], record.target, None))
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("name", Provenance.__struct_fields__)
def test_another_provenance_is_refused_by_name(name: str, made: Provenance, tmp_path: Path) -> None:
    Database(tmp_path / "db", made).open_search()
    other = replace(made, **{name: 7 if name == "threads" else "something else"})
    with pytest.raises(TuneBenchError, match=f"made with another {name} ") as caught:
        Database(tmp_path / "db", other)
    assert "--work-dir" in caught.value.hint
    Database(tmp_path / "db", made)


def test_what_is_packed_is_the_start(
    model: tuple[tvm.IRModule, list[Task], Records], made: Provenance, tmp_path: Path
) -> None:
    records, packed = model[2], tmp_path / "packed"
    before = written(packed, made, records)
    before.entries["17"] = Entry("some_kernel", [3], [1], decision="promoted")
    before.save_entries()
    kept = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    database = Database(tmp_path / "db", made, packed)
    assert (set(database.promoted()), database.entries) == (set(records), before.entries)
    assert not database.folder.exists()
    database.open_search()
    database.promote({})
    database.entries.clear()
    database.save_entries()
    again = Database(tmp_path / "db", made, packed)
    assert (again.source, again.promoted(), again.entries) == (again.folder, {}, {})
    assert {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()} == kept
    other = Database(tmp_path / "other", replace(made, tvm="something else"), packed)
    assert (other.source, other.promoted(), other.entries) == (other.folder, {}, {})


def test_the_folder_tells_target_device_and_threads(made: Provenance) -> None:
    names = {folder_name("llvm", replace(made, threads=n)) for n in (1, 2)}
    assert len(names) == 2
    assert all(name.startswith("llvm-") and "/" not in name for name in names)


def test_verdicts_are_kept(made: Provenance, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", made)
    database.open_search()
    database.entries["17"] = Entry("some_kernel", [3, 4], [1, 2], {"tuned": [1, 2]}, "promoted", "faster", "key", 70)
    database.save_entries()
    assert Database(tmp_path / "db", made).entries == database.entries


@pytest.mark.parametrize("folder", sorted(LOGS.iterdir()), ids=lambda folder: folder.name)
def test_committed_databases_are_read(folder: Path) -> None:
    made = msgspec.json.decode((folder / "provenance.json").read_bytes(), type=Provenance)
    database = Database(folder, made)
    assert {"promoted"} < {entry.decision for entry in database.entries.values()}
    assert all(entry.default_ns for entry in database.entries.values())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("provenance.json", '{"target": "llvm"}', "missing required field `device`"),
        ("provenance.json", "", "truncated"),
        (
            "verdicts.json",
            '{"17": {"name": "k", "decision": "won"}}',
            r"'won' - at `\$\[\.\.\.\]\.decision`",
        ),
        ("verdicts.json", '{"17": {"name": "k", "tuned_ns": [-1]}}', r"`\$\[\.\.\.\]\.tuned_ns\[0\]`"),
        ("verdicts.json", '{"17": {"name": "k", "newer": 1}}', "unknown field `newer`"),
    ],
)
def test_a_file_that_does_not_fit_is_named(name: str, text: str, words: str, made: Provenance, tmp_path: Path) -> None:
    Database(tmp_path, made).open_search()
    (tmp_path / name).write_text(text)
    with pytest.raises(TuneBenchError, match=words) as caught:
        Database(tmp_path, made)
    assert str(tmp_path / name) in caught.value.message


def test_a_folder_that_cannot_be_written_is_named(made: Provenance, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneBenchError, match=r"cannot write to .*file/db"):
        Database(tmp_path / "file" / "db", made).open_search()
