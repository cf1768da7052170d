"""Databases that were cut, mixed up, made up or interrupted: what is good is used, what is bad set aside."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tvm
from conftest import begin_search, draw_records, load_model, lower
from tvm.s_tir import meta_schedule as ms

from tunebench import durable
from tunebench.compile.tasks import Task
from tunebench.devices.targets import cpu_device
from tunebench.errors import StorageError, TuneBenchError
from tunebench.tuning import cost_model, records, shape, versions, vetting
from tunebench.tuning.database import VERDICTS, Database, Entry, Provenance, provenance
from tunebench.tuning.records import FILES, RECORDS, WORKLOADS
from tunebench.tuning.search import Trials, record_key
from tunebench.tuning.search_log import SearchLog

Records = dict[str, ms.database.TuningRecord]
LOGS = Path(__file__).parent.parent / "tuning_logs"
ENTRIES = {"17": Entry("one", [3], [1], decision="inconclusive"), "18": Entry("two", [3])}


CHECK = vetting.check


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, which takes seconds to start, is for the tests that are about it."""
    monkeypatch.setattr(vetting, "check", lambda found: None)


@pytest.fixture(scope="module")
def drawn(target: tvm.target.Target, config: Path) -> Records:
    return draw_records(lower(load_model(config, "q4f16_1"), target)[1][:6], target, 0)


@pytest.fixture(scope="module")
def made(target: tvm.target.Target) -> Provenance:
    return provenance(target, cpu_device(), 2)


@pytest.fixture
def folder(drawn: Records, made: Provenance, tmp_path: Path) -> Path:
    """A database with six records, as trials and promoted, and two decisions."""
    database = Database(tmp_path / "db", made)
    log = database.open_for_writing()
    for record in drawn.values():
        log.add(record)
    database.commit(drawn, ENTRIES)
    database.close()
    return tmp_path / "db"


def reopen(folder: Path, made: Provenance) -> tuple[Database, SearchLog]:
    """Open for writing and close; what was set aside is."""
    database = Database(folder, made)
    log = database.open_for_writing()
    database.close()
    return database, log


def edit(line: bytes, change: Callable[[Any], Any]) -> bytes:
    """A record's line, changed."""
    value = msgspec.json.decode(line)
    change(value)
    return json.dumps(value).encode()


def instructions(value: Any) -> Any:
    return value[1][0][0]


BAD_RECORDS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda line: line[: len(line) // 2], "truncated"),
    "garbage": (lambda line: b"\xff\xfe\x00\x01", "invalid|malformed"),
    "NaN": (lambda line: edit(line, lambda v: v[1].__setitem__(1, [float("nan")])), "malformed|invalid"),
    "negative": (lambda line: edit(line, lambda v: v[1].__setitem__(1, [-1.0])), "its time is no time"),
    "huge": (lambda line: edit(line, lambda v: v[1].__setitem__(1, [10**400])), r"out of range|its time|[Nn]umber"),
    "deep": (lambda line: b"[" * 100_000, "Expected `int`"),
    "no kernel": (lambda line: edit(line, lambda v: v.__setitem__(0, 99)), f"line 100 of {WORKLOADS}, is not there"),
    "type": (lambda line: edit(line, lambda v: v[1].__setitem__(2, "llvm")), "Expected `object"),
    "kind": (lambda line: edit(line, lambda v: instructions(v)[0].__setitem__(0, "Unhide")), "does not know"),
    "name": (lambda line: edit(line, lambda v: instructions(v)[-2].__setitem__(1, ["b99"])), "nothing defined|length"),
    "code": (
        lambda line: edit(
            line, lambda v: instructions(v).insert(1, ["Annotate", ["b0", '"int f();"'], ["pragma_import_c"], []])
        ),
        "annotation 'pragma_import_c'",
    ),
    "null": (lambda line: edit(line, lambda v: instructions(v)[0][2].__setitem__(1, None)), "another type"),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
@pytest.mark.parametrize("place", [1, -1])
def test_a_bad_record_costs_that_record(what: str, place: int, folder: Path, made: Provenance, drawn: Records) -> None:
    change, words = BAD_RECORDS[what]
    bad = {}
    for path, home in ((folder / "search", folder / "search"), (folder / "promoted", folder)):
        lines = (path / RECORDS).read_bytes().splitlines()
        bad[home] = lines[place] = change(lines[place])
        (path / RECORDS).write_bytes(b"\n".join(lines) + b"\n")
    number = place % len(drawn) + 1
    database = Database(folder, made)
    assert len(database.promoted()) == len(drawn) - 1
    (warning,) = database.warnings
    assert f"{folder / 'versions/1' / RECORDS}, line {number}: " in warning
    assert not (folder / f"{RECORDS}.bad").exists()  # a reader changes nothing
    database, log = reopen(folder, made)
    assert f"{folder / 'search' / RECORDS}, line {number}: " in log.warnings[0]
    assert re.search(words, log.warnings[0])
    assert len(Trials(log).measured) == len(drawn) - 1
    for home, line in bad.items():
        assert (home / f"{RECORDS}.bad").read_bytes() == line + b"\n"
    again, log = reopen(folder, made)
    assert (again.warnings, log.warnings, len(again.promoted())) == ([], [], len(drawn) - 1)


@pytest.mark.parametrize("place", [0, 2, -1])
def test_without_its_kernel_a_record_is_lost_and_no_other(
    place: int, folder: Path, made: Provenance, drawn: Records
) -> None:
    before = Trials(SearchLog(folder / "search")).measured
    path = folder / "search" / WORKLOADS
    lines = path.read_bytes().splitlines()
    lines[place] = lines[place][:50]
    path.write_bytes(b"\n".join(lines))  # and no end of the last line
    _, log = reopen(folder, made)
    kept = Trials(log)
    lost = [key for key in before if key not in kept.measured]
    assert len(lost) == 1
    assert len(kept.measured) == len(drawn) - 1
    database = Database(folder, made)
    log = database.open_for_writing()
    log.add(next(record for record in drawn.values() if record_key(record) == lost[0]))
    database.close()
    assert Trials(SearchLog(folder / "search")).measured == before
    assert SearchLog(folder / "search").warnings == []
    plain = ms.database.JSONDatabase(work_dir=str(folder / "search"), module_equality="structural")
    assert {record_key(record) for record in plain.get_all_tuning_records()} == set(before)


@pytest.mark.parametrize("name", FILES)
def test_a_last_line_without_its_end_does_not_glue(
    name: str, folder: Path, made: Provenance, drawn: Records, target: tvm.target.Target, config: Path
) -> None:
    path = folder / "search" / name
    path.write_bytes(path.read_bytes()[:-1])
    more = draw_records(lower(load_model(config, "q0f32"), target)[1][:2], target, 1)
    database = Database(folder, made)
    log = database.open_for_writing()
    for record in more.values():
        log.add(record)
    database.close()
    again = SearchLog(folder / "search")
    assert (len(Trials(again).measured), again.warnings) == (len(drawn) + len(more), [])


def test_a_bad_decision_costs_that_decision(folder: Path, made: Provenance, drawn: Records) -> None:
    path = folder / "promoted" / VERDICTS
    given = json.loads(path.read_text())
    given |= {
        "19": {"name": "k", "decision": "won"},
        "20": {"name": "k", "tuned_ns": [-1]},
        "21": {"name": "k", "x": 1},
    }
    path.write_text(json.dumps(given))
    database = Database(folder, made)
    assert database.entries == ENTRIES
    assert ["'won'" in database.warnings[0], "tuned_ns[0]" in database.warnings[1], "`x`" in database.warnings[2]] == [
        True
    ] * 3
    reopen(folder, made)
    again = Database(folder, made)
    assert (again.entries, again.warnings, len(again.promoted())) == (ENTRIES, [], len(drawn))
    assert set(json.loads((folder / f"{VERDICTS}.bad").read_text())) == {"19", "20", "21"}


def test_decisions_that_were_cut_do_not_cost_the_records(folder: Path, made: Provenance, drawn: Records) -> None:
    path = folder / "promoted" / VERDICTS
    text = path.read_bytes()[:-40]
    path.write_bytes(text)
    database, _ = reopen(folder, made)
    assert (database.entries, len(database.promoted())) == ({}, len(drawn))
    assert (folder / f"{VERDICTS}.1.bad").read_bytes() == text
    assert Database(folder, made).warnings == []


@pytest.mark.parametrize("name", [*FILES, VERDICTS])
def test_a_folder_in_a_files_place_is_moved_away(name: str, folder: Path, made: Provenance) -> None:
    path = folder / "promoted" / name
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("kept")
    assert f"cannot read {folder / 'versions/1' / name}" in Database(folder, made).warnings[0]
    reopen(folder, made)
    assert (folder / f"{name}.1.bad" / "inside").read_text() == "kept"
    assert Database(folder, made).warnings == []


def test_without_provenance_a_database_is_refused(folder: Path, made: Provenance, tmp_path: Path) -> None:
    (folder / "provenance.json").unlink()
    with pytest.raises(TuneBenchError, match=r"provenance\.json is missing"):
        Database(folder, made)
    assert not (folder / "provenance.json").exists()
    (tmp_path / "empty").mkdir()
    assert Database(tmp_path / "empty", made).promoted() == {}


# -- two processes -------------------------------------------------------------------------------------------


def test_of_two_writers_one_writes(folder: Path, made: Provenance) -> None:
    first, second = Database(folder, made), Database(folder, made)
    first.open_for_writing()
    with pytest.raises(TuneBenchError, match="being written by process"):
        second.open_for_writing()
    first.close()
    second.open_for_writing()
    second.close()


def test_trials_of_two_handles_keep_their_kernels(
    made: Provenance, target: tvm.target.Target, config: Path, tmp_path: Path
) -> None:
    """16 trials of 16 kernels, by two runs that take turns: each stays with its own."""
    found = lower(load_model(config, "q4f16_1"), target)[1] + lower(load_model(config, "q0f32"), target)[1]
    drawn = draw_records({task.key: task for task in found}.values(), target, 0)
    some = list(drawn.values())[:16]
    assert len(some) == 16
    handles = [Database(tmp_path, made), Database(tmp_path, made)]
    for i, record in enumerate(some):
        log = handles[i % 2].open_for_writing()
        assert log.warnings == []
        log.add(record)
        handles[i % 2].close()
    assert set(Trials(SearchLog(tmp_path / "search")).measured) == {record_key(record) for record in some}


def test_a_reader_beside_a_writer_has_one_version(folder: Path, made: Provenance, drawn: Records) -> None:
    reader, writer = Database(folder, made), Database(folder, made)
    writer.open_for_writing()
    for _ in range(3):
        writer.commit({}, {})
    writer.close()
    assert (set(reader.promoted()), reader.entries) == (set(drawn), ENTRIES)
    assert (Database(folder, made).promoted(), Database(folder, made).entries) == ({}, {})


# -- interrupted ---------------------------------------------------------------------------------------------

CALLS = ("open", "write", "fsync", "close", "replace", "symlink", "unlink", "mkdir", "rmdir", "rename")


class Ended(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("flat", [False, True])
def test_a_kill_between_any_two_calls_leaves_old_or_new(
    flat: bool, folder: Path, made: Provenance, drawn: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a commit asks of the system is cut short after n calls, for every n; nothing runs afterwards."""
    if flat:
        for name in (*FILES, VERDICTS):
            shutil.copy(folder / "promoted" / name, folder / name)
        (folder / "promoted").unlink()
        shutil.rmtree(folder / "versions")
    fewer, entries = dict(list(drawn.items())[:2]), {"18": Entry("two", [4])}
    old, new = (sorted(drawn), ENTRIES), (sorted(fewer), entries)
    seen = []
    for n in range(10_000):
        copy = folder.with_name(f"copy{n}")
        shutil.copytree(folder, copy, symlinks=True)
        database = Database(copy, made)
        database.promoted()
        left = [n]
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counted(getattr(os, name), left))
            patch.setattr(vetting, "remember", lambda *given: None)
            try:
                database.commit(fewer, entries)
                done = True
            except Ended:
                done = False
        found = Database(copy, made)
        vetting.remember(found._parts[0], copy)
        state = (sorted(found.promoted()), found.entries)
        assert state in (old, new)
        assert found.warnings == []
        seen.append(state == new)
        shutil.rmtree(copy)
        if done:
            break
    assert seen[0] is False
    assert seen[-1] is True
    assert seen == sorted(seen)
    assert len(seen) > 20


def counted(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """A system call that is made so many more times only."""

    def counting(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Ended
        return call(*given, **named)

    return counting


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_full_or_broken_disk_is_one_line_and_loses_nothing(
    number: int, folder: Path, made: Provenance, drawn: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    database = Database(folder, made)
    log = database.open_for_writing()
    write, room = os.write, [40]

    def filling(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(number, os.strerror(number))
        part = bytes(data)[: room[0]]
        room[0] -= len(part)
        return write(file, part)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", filling)
        with pytest.raises(StorageError) as caught:
            database.commit(dict(list(drawn.items())[:2]), {})
        room[0] = 40
        with pytest.raises(StorageError):
            log.add(next(iter(drawn.values())))
    database.close()
    assert caught.value.exit_code == 1
    assert ("no space left" in caught.value.message) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"} == files
    found = Database(folder, made)
    assert (set(found.promoted()), found.entries, found.warnings) == (set(drawn), ENTRIES, [])


def test_a_disk_that_lies_is_noticed(
    folder: Path, made: Provenance, drawn: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(folder, made)
    database.open_for_writing()
    monkeypatch.setattr(durable, "write", lambda path, data: path.write_bytes(data[:-1]))
    with pytest.raises(StorageError, match="cannot write"):
        database.commit({}, {})
    assert set(Database(folder, made).promoted()) == set(drawn)


# -- from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["../elsewhere", "versions/../..", "/tmp", "versions/1/..", "versions/01"])
def test_a_link_that_leaves_the_folder_is_refused(to: str, folder: Path, made: Provenance) -> None:
    (folder / "promoted").unlink()
    os.symlink(to, folder / "promoted")
    with pytest.raises(TuneBenchError, match="does not name one of"):
        Database(folder, made)


@pytest.mark.parametrize("name", ["versions", "versions/1", "versions/1/tunebench"])
def test_a_reader_does_not_follow_a_link_out(name: str, folder: Path, made: Provenance, tmp_path: Path) -> None:
    (folder / "versions/1/tunebench").mkdir(exist_ok=True)
    (folder / name).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    with pytest.raises(TuneBenchError, match="leads out of its folder"):
        Database(folder, made)


@pytest.mark.parametrize("how", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", [RECORDS, WORKLOADS, VERDICTS])
def test_a_link_or_pipe_in_a_files_place_is_moved_away(
    name: str, how: str, folder: Path, made: Provenance, tmp_path: Path
) -> None:
    """It is neither read nor written, and nothing waits for it."""
    for place in (folder / "promoted" / name, folder / "search" / name, folder / "search" / "cost_model.npy"):
        place.unlink(missing_ok=True)
        if how == "pipe":
            os.mkfifo(place)
        else:
            os.symlink(__file__ if how == "link" else tmp_path / "nowhere", place)
    before = Path(__file__).read_bytes()
    database, _ = reopen(folder, made)
    assert f"cannot read {folder / 'versions/1' / name} (it is " in database.warnings[0]
    with pytest.raises(TuneBenchError, match=r"it is no file.*learns anew"):
        cost_model.load(database.cost_model_path)
    database.close()
    assert Database(folder, made).warnings == []
    assert SearchLog(folder / "search").warnings == []
    assert Path(__file__).read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("how", ["link", "pipe"])
def test_a_writer_goes_through_no_link_or_pipe(how: str, folder: Path, made: Provenance, tmp_path: Path) -> None:
    for name in ("new-provenance.json", "new-promoted"):
        os.mkfifo(folder / name) if how == "pipe" else os.symlink(tmp_path / "elsewhere", folder / name)
    database, _ = reopen(folder, made)
    database.commit(database.promoted(), ENTRIES)
    assert Database(folder, made).entries == ENTRIES
    os.mkfifo(folder / f"{RECORDS}.bad") if how == "pipe" else os.symlink(
        tmp_path / "elsewhere", folder / f"{RECORDS}.bad"
    )
    with (folder / "promoted" / RECORDS).open("ab") as file:
        file.write(b"bad\n")
    database.close()
    with pytest.raises(TuneBenchError, match="cannot write to"):
        Database(folder, made).open_for_writing()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["search", "versions"])
def test_a_writer_does_not_follow_a_link_out(name: str, folder: Path, made: Provenance, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    before = sorted(tmp_path.rglob("elsewhere/*"))
    with pytest.raises(TuneBenchError, match="leads out of its folder"):
        Database(folder, made).open_for_writing()
    assert sorted(tmp_path.rglob("elsewhere/*")) == before


def test_a_file_that_is_too_large_is_not_read(folder: Path, made: Provenance) -> None:
    with (folder / "promoted" / RECORDS).open("ab") as file:
        file.truncate(records.MOST_BYTES + 1)
    database = Database(folder, made)
    assert database.promoted() == {}
    assert "larger than 256 MiB" in database.warnings[0]


def test_pickles_in_the_search_folder_run_nothing(folder: Path, made: Provenance, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("cost_model.npy", "cost_model.tar", "data.npy"):
        with (folder / "search" / name).open("wb") as file:
            np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    database, _ = reopen(folder, made)
    with pytest.raises(TuneBenchError, match="learns anew"):
        cost_model.load(database.cost_model_path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileExistsError):  # the bomb is one
        (
            np.load(folder / "search" / "data.npy", allow_pickle=True),
            np.load(folder / "search" / "data.npy", allow_pickle=True),
        )


def test_objects_that_are_no_kernel_are_refused_before_tvm_makes_them(folder: Path) -> None:
    import base64

    line = (folder / "promoted" / WORKLOADS).read_bytes().splitlines()[0]
    digest, text = json.loads(line)
    shape.check_workload(line)
    graph = json.loads(base64.b64decode(text)[8:])
    for change, words in (
        ({"type": "ffi.Module", "data": {"bytes": ""}}, r"a node of type 'ffi\.Module'"),
        ({"type": "ffi.Function", "data": "runtime.ModuleLoadFromFile"}, "a node of type 'ffi.Function'"),
        ({"type": "ir.Op", "data": "tirx.call_packed"}, r"a call of 'tirx\.call_packed'"),
    ):
        changed = json.dumps({**graph, "nodes": [*graph["nodes"], change]}).encode()
        packed = base64.b64encode(len(changed).to_bytes(8, "little") + changed).decode()
        with pytest.raises(ValueError, match=words):
            shape.check_workload(json.dumps([digest, packed]).encode())


def test_what_crashes_tvm_crashes_another_process(
    folder: Path, made: Provenance, drawn: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check of its shape off, a record that TVM crashes on costs itself alone."""
    path = folder / "promoted" / RECORDS
    lines = path.read_bytes().splitlines()
    lines[2] = edit(lines[2], lambda v: instructions(v)[0][2].__setitem__(1, None))
    path.write_bytes(b"\n".join(lines) + b"\n")
    monkeypatch.setattr(shape, "check_record", lambda line: int(json.loads(line)[0]))
    monkeypatch.setattr(vetting, "check", CHECK)
    database = Database(folder, made)
    assert len(database.promoted()) == len(drawn) - 1
    assert "line 3: TVM crashed on it" in database.warnings[0]


def test_what_was_written_here_is_not_tried_again(
    folder: Path, made: Provenance, drawn: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(vetting, "check", lambda found: tried.append(found.folder))
    assert len(Database(folder, made).promoted()) == len(drawn)
    SearchLog(folder / "search")
    assert tried == []
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)  # as it comes from elsewhere
    assert len(Database(tmp_path / "copy", made).promoted()) == len(drawn)
    assert tried == [tmp_path / "copy" / "versions" / "1"]


def test_edits_of_records_are_refused_or_hold(tmp_path: Path) -> None:
    """Single values of committed records, changed at random: what the shape lets pass, another process can read."""
    source = records.read(LOGS / "cuda-nvidia-h200/tunebench")
    rng, odd = random.Random(0), [None, True, -1, 2**60, 0.5, "", "b0", '"x"', "{}", [], [1], {}, "main"]
    changed = records.Lines(tmp_path, dict(source.workloads))
    for number in range(400):
        value = msgspec.json.decode(rng.choice(list(source.records.values())))
        at, key = rng.choice(places(value))
        at[key] = rng.choice(odd)
        line = json.dumps(value).encode()
        try:
            changed.workload_of[number] = shape.check_record(line)
        except ValueError:
            continue
        if changed.workload_of[number] in changed.workloads:
            changed.records[number] = line
    passed = len(changed.records)
    CHECK(changed)
    assert 20 < passed < 300
    assert 0 < len(records.load(changed)) <= passed
    assert not [reason for reason in changed.reasons[RECORDS] if "crashed" in reason]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a value within JSON."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    return [found for key in keys for found in ((value, key), *places(value[key]))]


# -- plain TVM -----------------------------------------------------------------------------------------------

PLAIN = """
import sys
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms
database = ms.database.JSONDatabase(work_dir=sys.argv[1], module_equality="structural")
for record in database.get_all_tuning_records():
    sch = s_tir.Schedule(record.workload.mod)
    record.trace.apply_to_schedule(sch, remove_postproc=False)
    print(sch.mod["main"].attrs["global_symbol"] if "global_symbol" in sch.mod["main"].attrs else "applied")
assert not [name for name in sys.modules if name.startswith("tunebench")]
"""


def test_plain_tvm_applies_the_float_records(
    made: Provenance, drawn: Records, target: tvm.target.Target, config: Path, tmp_path: Path
) -> None:
    tasks = lower(load_model(config, "q4i8f16_0"), target)[1]
    both = drawn | {key: record for key, record in draw_records(tasks, target, 0).items() if key not in drawn}
    database = Database(tmp_path / "db", made)
    database.open_for_writing()
    database.commit(both, {})
    database.close()
    ours = list((tmp_path / "db/promoted/tunebench" / RECORDS).read_bytes().splitlines())
    assert ours
    assert all(b"tunebench.dot." in line for line in ours)
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "db" / "promoted")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == len(both) - len(ours) > 0
    assert set(Database(tmp_path / "db", made).promoted()) == set(both)


# -- the cost model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught(target: tvm.target.Target, config: Path) -> tuple[ms.cost_model.XGBModel, ms.TuneContext, list[Any]]:
    """A model that learned from candidates of one kernel."""
    task: Task = lower(load_model(config, "q4f16_1"), target)[1][0]
    found = begin_search(task, target)
    drawn = [sch for seed in range(20) for sch in begin_search(task, target, seed).context.generate_design_space()]
    candidates = [ms.MeasureCandidate(sch, []) for sch in drawn]
    model = cost_model.new()
    model.num_warmup_samples = 4
    times = [ms.runner.RunnerResult([1e-3 * (1 + i % 7)], None) for i in range(len(candidates))]
    model.update(found.context, candidates, times)
    return model, found.context, candidates


def test_a_cost_model_comes_back(
    taught: tuple[ms.cost_model.XGBModel, ms.TuneContext, list[Any]], tmp_path: Path
) -> None:
    model, context, candidates = taught
    path = tmp_path / "cost_model.npy"
    (tmp_path / "cost_model.tar").write_text("an older TuneBench's")
    cost_model.save(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["cost_model.npy"]
    again = cost_model.load(path)
    again.num_warmup_samples = model.num_warmup_samples
    assert again.data_size == model.data_size == len(candidates)
    assert np.allclose(again.predict(context, candidates), model.predict(context, candidates), atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "shape", "NaN", "other"])
def test_a_damaged_cost_model_is_one_line(
    damage: str, taught: tuple[ms.cost_model.XGBModel, ms.TuneContext, list[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "cost_model.npy"
    cost_model.save(taught[0], path)
    data = path.read_bytes()
    rows = np.load(path)
    rows["features"][0] = np.nan
    if damage in ("NaN", "other"):
        np.save(path, rows if damage == "NaN" else np.zeros((3, 164)))
    else:
        huge = data.replace(f"({len(rows)},)".encode(), b"(" + b"9" * len(str(len(rows))) + b",)")
        path.write_bytes({"cut": data[:-9], "garbage": b"\x93NUMPY\xff" * 9, "empty": b"", "shape": huge}[damage])
    with pytest.raises(TuneBenchError, match="learns anew"):
        cost_model.load(path)


def test_numbers_of_versions_go_on(tmp_path: Path) -> None:
    for n in range(1, 5):
        assert versions.put(tmp_path, {"file": b"%d" % n}).name == str(n)
        assert (versions.current(tmp_path) / "file").read_bytes() == b"%d" % n
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["3", "4"]
