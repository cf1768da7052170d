"""Databases: provenance, promotion, versions."""

from __future__ import annotations

import shutil
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
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.entry import Entry, Provenance
from tunebench.tuning.files import folder_name
from tunebench.tuning.records import FILES
from tunebench.tuning.search import Trials, record_key
from tunebench.tuning.search_log import SearchLog

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
    log = database.open_for_writing()
    for record in records.values():
        log.add(record)
    database.commit(records, {})
    database.close()
    return database


def trials_of(database: Database) -> Trials:
    return Trials(SearchLog(database.search_folder))


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
    database.open_for_writing()
    kept = dict(list(records.items())[:3])
    database.commit(kept, {})
    assert set(Database(tmp_path / "db", made).promoted()) == set(kept)
    database.commit({}, {})
    assert Database(tmp_path / "db", made).promoted() == {}
    assert all((tmp_path / "db" / "promoted" / name).read_text() == "" for name in FILES)
    assert len(trials_of(database).measured) == len(records)  # the trials stay
    assert len(list((tmp_path / "db" / "versions").iterdir())) == 2  # the last and the one before


def test_an_unused_folder_is_empty_and_stays_away(made: Provenance, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", made)
    assert database.promoted() == {}
    assert database.entries == {}
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("name", Provenance.__struct_fields__)
def test_another_provenance_is_refused_by_name(name: str, made: Provenance, tmp_path: Path) -> None:
    written(tmp_path / "db", made, {})
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
    before.open_for_writing()
    before.commit(records, {"17": Entry("some_kernel", [3], [1], decision="inconclusive")})
    before.close()
    kept = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    database = Database(tmp_path / "db", made, packed)
    assert (set(database.promoted()), database.entries) == (set(records), before.entries)
    assert not database.folder.exists()
    database.open_for_writing()
    assert set(Database(tmp_path / "db", made, packed).promoted()) == set(records)
    database.commit({}, {})
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
    database.open_for_writing()
    entries = {"17": Entry("some_kernel", [3, 4], [1, 2], {"tuned": [1, 2]}, "promoted", "faster", "key", 70)}
    database.commit({}, entries)
    assert Database(tmp_path / "db", made).entries == database.entries == entries


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
    ],
)
def test_a_file_that_does_not_fit_is_named(name: str, text: str, words: str, made: Provenance, tmp_path: Path) -> None:
    written(tmp_path, made, {})
    (tmp_path / name).write_text(text)
    with pytest.raises(TuneBenchError, match=words) as caught:
        Database(tmp_path, made)
    assert str(tmp_path / name) in caught.value.message


def test_a_folder_that_cannot_be_written_is_named(made: Provenance, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneBenchError, match=r"cannot write to .*file/db"):
        Database(tmp_path / "file" / "db", made).open_for_writing()


def test_what_another_run_promoted_meanwhile_stays(
    made: Provenance, model: tuple[tvm.IRModule, list[Task], Records], tmp_path: Path
) -> None:
    """Both began from what is packed; the second one's lock came when the first had promoted something."""
    key, second = next(iter(model[2].items()))
    packed = written(tmp_path / "packed", made, {}).folder
    late = Database(tmp_path / "db", made, packed)
    early = Database(tmp_path / "db", made, packed)
    early.open_for_writing()
    early.commit({key: second}, {key: Entry("kernel", [2], [1], decision="promoted")})
    early.close()
    late.open_for_writing()
    assert set(late.promoted()) == set(late.entries) == {key}
    late.close()
    assert set(Database(tmp_path / "db", made, packed).promoted()) == {key}


def test_a_folder_that_was_only_begun_hides_nothing(made: Provenance, tmp_path: Path) -> None:
    """A run that ended before its first version leaves a provenance at most."""
    packed = written(tmp_path / "packed", made, {}).folder
    (tmp_path / "db").mkdir()
    (tmp_path / "db/provenance.json").write_bytes((packed / "provenance.json").read_bytes())
    (tmp_path / "db/versions/1").mkdir(parents=True)
    assert Database(tmp_path / "db", made, packed).source == packed


def test_a_kernel_whose_record_was_lost_is_not_promoted(made: Provenance, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", made)
    database.open_for_writing()
    database.commit({}, {"17": Entry("kernel", [2], [1], decision="promoted", reason="faster")})
    database.close()
    again = Database(tmp_path / "db", made)
    assert again.promoted() == {}
    assert (again.entries["17"].decision, again.entries["17"].tuned_ns) == ("", [])
    assert "record was no good" in again.entries["17"].reason


def test_a_link_to_a_version_that_is_gone_is_named(made: Provenance, tmp_path: Path) -> None:
    database = Database(tmp_path / "db", made)
    database.open_for_writing()
    database.commit({}, {"17": Entry("kernel")})
    database.close()
    shutil.rmtree((tmp_path / "db/promoted").resolve())
    with pytest.raises(TuneBenchError, match="which is not there"):
        Database(tmp_path / "db", made)
