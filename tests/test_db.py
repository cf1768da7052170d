"""`tunebench db`: what databases hold, whether it is right, and how they are merged, pruned, compared and passed on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tvm
from conftest import draw_records, load_model, lower
from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench import environment, installation
from tunebench.cli import app, inputs
from tunebench.compile.tasks import Task
from tunebench.devices.targets import cpu_device
from tunebench.errors import TuneBenchError
from tunebench.runners.base import Outcome, Timed
from tunebench.tuning import archive, content, files, here, merge, prune, verify
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.entry import Entry, Provenance
from tunebench.tuning.files import folder_name
from tunebench.tuning.records import FILES, RECORDS, WORKLOADS
from tunebench.tuning.search import FAILED_S, record_key

LOGS = Path(__file__).parent.parent / "tuning_logs"
Records = dict[str, ms.database.TuningRecord]
Conflict = tuple[Path, Path, Records]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def tasks(target: tvm.target.Target, config: Path) -> list[Task]:
    """Those that have the most schedules first."""
    found = lower(load_model(config, "q4f16_1"), target)[1]
    chosen = [task for name in ("matmul", "attention", "append") for task in found if name in task.name]
    return chosen[:2] + chosen[-2:]


@pytest.fixture(scope="module")
def records(tasks: list[Task], target: tvm.target.Target) -> Records:
    return draw_records(tasks, target, 0)


@pytest.fixture
def made(target: tvm.target.Target) -> Provenance:
    return provenance(target, cpu_device(), 2)


def entry(name: str, faster: float = 2.0, **changes: object) -> Entry:
    """A decision on a kernel that became so many times as fast."""
    found = Entry(name, [1000] * 9, [int(1000 / faster)] * 9, decision="promoted", reason="faster")
    return replace(found, **changes)


def write(folder: Path, made: Provenance, records: Records, faster: float = 2.0) -> Path:
    """A database of promoted records, and a kernel that kept its default."""
    database = Database(folder, made)
    log = database.open_for_writing()
    for record in records.values():
        log.add(record)
    entries = {key: entry(f"kernel{i}", faster) for i, key in enumerate(records)}
    database.commit(records, {**entries, "17": Entry("lost", [10] * 9, [11] * 9, decision="kept default")})
    database.close()
    return folder


@pytest.fixture
def folder(tmp_path: Path, made: Provenance, records: Records) -> Path:
    return write(tmp_path / "work" / "tuning_logs" / folder_name("llvm", made), made, records)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`tunebench db` with these arguments: its exit code and what it printed."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tunebench", "db", *map(str, arguments)])
        monkeypatch.setattr(inputs.console, "_width", 400)
        with pytest.raises(SystemExit) as caught:
            app.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out + printed.err

    return call


Run = Callable[..., tuple[int, str]]


# -- ls, show, diff -----------------------------------------------------------------------------------------


def test_a_list_names_both_places_and_who_uses_what(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "tuning_logs", lambda: LOGS)
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    code, out = run("ls", "--work-dir", folder.parent.parent)
    assert code == 0
    (mine,) = (line for line in out.splitlines() if line.startswith(folder.name) and "--target" in line)
    assert mine.split()[-4:] == ["--target", "llvm", "--threads", "2"]
    assert "4 of 5" in mine
    assert re.search(r"^cuda-nvidia-h200 +70 of 110 .* another device: NVIDIA H200", out, re.M)


def test_a_packed_database_gives_way_to_the_work_folders(folder: Path) -> None:
    assert here.used_by(files.glance(folder)).startswith("--target llvm")
    assert "has its own" in here.used_by(files.glance(folder), replaced=True)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("device", "Another CPU (k8)", "another device: Another CPU"), ("tvm", "0.1", "nothing: made with TVM 0.1")],
)
def test_a_database_that_is_not_used_says_why(
    field: str, value: str, words: str, made: Provenance, tmp_path: Path
) -> None:
    other = replace(made, **{field: value})
    assert words in here.used_by(files.glance(write(tmp_path / folder_name("llvm", other), other, {})))


def test_a_folder_of_another_name_is_no_targets(folder: Path) -> None:
    moved = folder.rename(folder.parent / "mine")
    assert "no target's folder" in here.used_by(files.glance(moved))


def test_damage_shows_at_a_glance(folder: Path) -> None:
    assert files.glance(folder).warnings == []
    path = folder / "promoted" / RECORDS
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])
    (folder / "verdicts.json.bad").write_text("{}")
    assert [
        each for word in ("records, and 4", "was no good") for each in files.glance(folder).warnings if word in each
    ]
    (folder / "provenance.json").write_text("{}")
    assert files.glance(folder).made is None


def test_a_listing_needs_no_tvm() -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from tunebench.tuning import files, here;"
        f"print(here.used_by(files.glance(Path({str(LOGS / 'cuda-nvidia-h200')!r})))); sys.exit('tvm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=LOGS.parent, check=False).returncode == 0


def test_kernels_are_shown_with_times_and_schedule(run: Run) -> None:
    code, out = run("show", LOGS / "cuda-nvidia-h200", "matmul_16bit_512x12288x4096")
    assert code == 0
    row = next(line for line in out.splitlines() if line.startswith("matmul_16bit"))
    assert " promoted  207.79      72.24     2.87x (2.86 to 2.88)  library (cublas)" in row
    assert "before signatures were kept" in row
    assert "template cublas: blocks 1" in out
    assert '  Annotate(b0, "cublas", tunebench.template)' in out
    assert run("show", LOGS / "cuda-nvidia-h200", "nothing")[0] == 2


def test_a_name_that_is_too_long_for_a_path_is_no_database(run: Run) -> None:
    code, out = run("show", "x" * 5000)
    assert (code, "there is no database in xxx" in out) == (2, True)
    assert run("ls", "--work-dir", "x" * 5000)[0] == 0


def test_a_space_is_compared_by_its_signature() -> None:
    kernel = content.Kernel("1", entry("a", space="abcdefgh123"))
    assert [kernel.space(), kernel.space("abcdefgh123")] == ["abcdefgh", "current"]
    assert kernel.space("another").startswith("older")


def test_two_databases_side_by_side(
    tmp_path: Path, made: Provenance, tasks: list[Task], records: Records, run: Run
) -> None:
    keys = list(records)
    a = write(tmp_path / "a", made, {key: records[key] for key in keys[:3]})
    other = replace(made, device="another")
    trace = next(
        record
        for seed in range(1, 50)
        for record in draw_records(tasks[:1], records[keys[0]].target, seed).values()
        if record_key(record) != record_key(records[keys[0]])
    )
    b = write(tmp_path / "b", other, {keys[0]: trace, keys[1]: records[keys[1]], keys[3]: records[keys[3]]})
    code, out = run("diff", a, b)
    assert code == 0
    assert "device" in next(line for line in out.splitlines() if line.startswith("Made for different ones"))
    assert sorted(out.splitlines()[-1].split(", ")) == [
        "1 no record", "1 only in A", "1 only in B", "1 other record", "1 same record"
    ]  # fmt: skip


# -- verify -------------------------------------------------------------------------------------------------


def test_a_sound_database_is_verified_on_its_device(folder: Path, run: Run) -> None:
    code, out = run("verify", folder, "--kernels", "2")
    assert (code, "4 of 4 records" in out, "outputs of 2 kernels checked against float64" in out) == (0, True, True)
    assert "Nothing is wrong." in out


def test_a_wrong_kernel_is_a_line_and_exit_code_1(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute nothing at all."""
    monkeypatch.setattr(verify, "replay", lambda mod, record: broken(mod))
    code, out = run("verify", folder)
    assert code == 1
    wrong = [line for line in out.splitlines() if line.startswith("wrong: kernel")]
    assert len(wrong) == 4
    assert out.splitlines()[-1] == "4 wrong"


def broken(mod: tvm.IRModule) -> tvm.IRModule:
    """The same kernel, none of whose loops runs."""
    body = json.loads(tvm.ir.save_json(mod))
    nodes = body["nodes"]
    loops = [node for node in nodes if node["type"] == "tirx.For"]
    one = {"type": "ir.IntImm", "data": json.loads(json.dumps(nodes[loops[0]["data"]["extent"]]["data"]))}
    one["data"]["value"] = 0
    nodes.append(one)
    for loop in loops:
        loop["data"]["extent"] = len(nodes) - 1
    return tvm.ir.load_json(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["entries"].pop(data["key"]), "it has a record, and the decision"),
        (lambda data: data["entries"][data["key"]].update(decision="kept default"), "and the decision 'kept default'"),
        (lambda data: data["entries"].update({"9": data["entries"][data["key"]]}), "promoted, and has no record"),
    ],
)
def test_records_and_decisions_must_agree(change: Change, words: str, folder: Path) -> None:
    path = folder / "promoted" / "verdicts.json"
    entries = json.loads(path.read_bytes())
    change({"entries": entries, "key": next(key for key in entries if key != "17")})
    path.write_text(json.dumps(entries))
    (problem,) = verify.check_lines(content.read(folder))[1]
    assert words in str(problem)


def test_a_hash_that_is_another_kernels_is_found(folder: Path) -> None:
    path = folder / "promoted" / WORKLOADS
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(msgspec.json.encode(["12345", json.loads(first)[1]]) + b"\n" + b"".join(rest))
    problems = [str(each) for each in verify.check_lines(content.read(folder))[1]]
    assert any(each.startswith("kernel 12345: ") and "hash" in each for each in problems)


# -- merge --------------------------------------------------------------------------------------------------


@pytest.fixture
def conflict(tmp_path: Path, made: Provenance, tasks: list[Task], records: Records) -> Conflict:
    """Two databases with other records of the first kernel, where the second's is faster; and its records."""
    seeds = (draw_records(tasks[:1], next(iter(records.values())).target, seed) for seed in range(1, 50))
    key = next(iter(records))
    better = next(each for each in seeds if record_key(each[key]) != record_key(records[key]))
    return write(tmp_path / "a", made, records), write(tmp_path / "b", made, better, faster=3.0), better


def test_the_larger_speedup_is_kept(
    conflict: Conflict, made: Provenance, records: Records, tmp_path: Path, run: Run
) -> None:
    a, b, better = conflict
    code, out = run("merge", a, b, "--into", tmp_path / "all")
    assert (code, "larger speed-up" in out, "5 kernels" in out) == (0, True, True)
    for order in ((a, b), (b, a)):
        into = tmp_path / f"in-{order[0].name}"
        merge.merge(order, into)
        database = Database(into, made)
        kept = {key: record_key(record) for key, record in database.promoted().items()}
        assert kept == {key: record_key(record) for key, record in {**records, **better}.items()}
        assert database.entries[next(iter(better))].tuned_ns == [333] * 9
        assert verify.check_lines(content.read(into))[1] == []


def test_a_merge_keeps_what_the_folder_has(conflict: Conflict, made: Provenance, records: Records) -> None:
    a, b, _ = conflict
    choices, warnings = merge.merge([b], a)
    assert warnings == []
    assert merge.counts(choices)[b, "larger speed-up"] == 1
    assert set(Database(a, made).promoted()) == set(records)


def test_other_provenance_is_refused(folder: Path, made: Provenance, records: Records, tmp_path: Path) -> None:
    other = write(tmp_path / "other", replace(made, threads=1), records)
    with pytest.raises(TuneBenchError, match=r"not for the same: threads 1 \(there 2\)"):
        merge.merge([folder, other], tmp_path / "into")
    assert not (tmp_path / "into").exists()


class Replayed:
    """A runner that answers with times that are given, by the candidate's name."""

    def __init__(self, times: dict[str, int]) -> None:
        self.times = times

    def compare(
        self, given: object, candidates: Sequence[object], protocol: object, with_default: bool = True
    ) -> dict[str, Outcome]:
        names = [str(each.name) for each in candidates] + ["default"] * with_default  # type: ignore[attr-defined]
        return {name: Timed((self.times[name],) * 9) for name in names}


@pytest.mark.parametrize(("times", "winner"), [((10, 20), 0), ((20, 10), 1), ((40, 30), None)])
def test_a_new_measurement_decides(
    times: tuple[int, int],
    winner: int | None,
    conflict: Conflict,
    target: tvm.target.Target,
    made: Provenance,
    tmp_path: Path,
) -> None:
    a, b, better = conflict

    class Device:
        cold_bytes = 1

    Device.target = target  # type: ignore[attr-defined]
    runner = Replayed({"0": times[0], "1": times[1], "again": min(times), "default": 25})

    def measure(key: str, kernels: Sequence[merge.Kernel]) -> merge.Kernel:
        ordered = sorted(kernels, key=lambda kernel: kernel.folder)
        return merge.measure_again(Device(), runner, key, ordered)  # type: ignore[arg-type]

    merge.merge([a, b], tmp_path / "into", measure)
    database, key = Database(tmp_path / "into", made), next(iter(better))
    expected = None if winner is None else record_key(Database((a, b)[winner], made).promoted()[key])
    found = database.promoted().get(key)
    assert (record_key(found) if found else None) == expected
    assert database.entries[key].default_ns == [25] * 9
    assert database.entries[key].decision == ("kept default" if winner is None else "promoted")


# -- prune --------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_best_trials_and_all_records(folder: Path, made: Provenance, records: Records) -> None:
    path, key = folder / "search" / RECORDS, next(iter(records))
    lines = path.read_bytes().splitlines()
    for seconds in (FAILED_S, 5e-4, 2e-3):
        record = json.loads(lines[0])
        record[1][1] = [seconds]
        lines.append(msgspec.json.encode(record))
    path.write_bytes(b"\n".join(lines) + b"\n")
    (folder / "verdicts.json.bad").write_text("bad\n")
    before = {name: (folder / "promoted" / name).read_bytes() for name in (*FILES, "verdicts.json")}
    assert len(list((folder / "versions").iterdir())) == 1
    found = prune.find(folder, keep=2)
    assert (found.dropped, [each.name for each in found.paths]) == (2, ["verdicts.json.bad"])
    size = path.stat().st_size
    prune.apply(folder, keep=2)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [record[1][1] for record in kept if record[0] == 0] == [[1e-3], [5e-4]]
    assert found.freed_bytes == size - path.stat().st_size + len("bad\n")
    assert {name: (folder / "promoted" / name).read_bytes() for name in before} == before
    assert key in Database(folder, made).promoted()
    assert not list(folder.glob("*.bad"))
    assert prune.find(folder, keep=2).freed_bytes == 0


def test_pruning_asks_and_a_dry_run_leaves_all(folder: Path, made: Provenance, run: Run) -> None:
    database = Database(folder, made)
    database.open_for_writing()
    database.commit(database.promoted(), {**database.entries, "5": Entry("nothing is known of it")})
    database.close()
    before = sorted(path for path in folder.rglob("*"))
    code, out = run("prune", folder, "--dry-run")
    assert (code, "nothing was dropped" in out, "1 entries" in out) == (0, True, True)
    assert str(folder / "versions" / "1") in out
    assert run("prune", folder)[0] == 2
    assert sorted(path for path in folder.rglob("*")) == before
    assert run("prune", folder, "--yes")[0] == 0
    assert [path.name for path in (folder / "versions").iterdir()] == [(folder / "promoted").readlink().name]
    assert "5" not in Database(folder, made).entries
    assert run("prune", folder, "--yes")[1].strip().endswith("has nothing to drop.")


def test_pruning_follows_no_link(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "search", tmp_path / "search")
    (folder / "search").symlink_to(tmp_path / "search")
    with pytest.raises(TuneBenchError, match="leads out of its folder"):
        prune.apply(folder, keep=1)


# -- export, import -----------------------------------------------------------------------------------------


def test_what_is_exported_comes_back(folder: Path, made: Provenance, records: Records, tmp_path: Path) -> None:
    path = tmp_path / "one.tbdb"
    archive.write(folder, path)
    again, found = archive.unpack(path, tmp_path / "there")
    assert again.name == folder.name
    assert found.entries == Database(folder, made).entries
    there = Database(again, made)
    assert {key: record_key(record) for key, record in there.promoted().items()} == {
        key: record_key(record) for key, record in records.items()
    }
    archive.write(again, tmp_path / "two.tbdb")
    assert (tmp_path / "two.tbdb").read_bytes() == path.read_bytes()
    plain = ms.database.JSONDatabase(work_dir=str(again), module_equality="structural")
    assert len(plain) == len(records)


def test_an_import_replaces_nothing(folder: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "one.tbdb"
    archive.write(folder, path)
    before = {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    code, out = run("import", path, "--work-dir", folder.parent.parent)
    assert (code, "tunebench db merge" in out) == (2, True)
    assert {each: each.read_bytes() for each in folder.rglob("*") if each.is_file()} == before


def test_what_is_damaged_is_not_exported(folder: Path, tmp_path: Path) -> None:
    with (folder / "promoted" / RECORDS).open("a") as file:
        file.write("[0, 1]\n")
    with pytest.raises(TuneBenchError, match="line 5"):
        archive.write(folder, tmp_path / "one.tbdb")
    assert not (tmp_path / "one.tbdb").exists()


def repacked(path: Path, change: Callable[[dict[str, bytes]], object], honest: bool = True) -> None:
    """The archive with other parts; `honest`: its manifest says what they are."""
    with zipfile.ZipFile(path) as given:
        parts = {name: given.read(name) for name in given.namelist()}
    change(parts)
    if honest:
        manifest = json.loads(parts["manifest.json"])
        manifest["members"] = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in parts.items()
            if name != "manifest.json"
        }
        parts["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in parts.items():
            made.writestr(name, data)


def claims(parts: dict[str, bytes], **changes: object) -> None:
    """Another manifest."""
    parts["manifest.json"] = json.dumps({**json.loads(parts["manifest.json"]), **changes}).encode()


EXTERN = '[["GetSBlock",[],["root","main"],["b0"]],["Annotate",["b0","\\"int f(){}\\""],["pragma_import_llvm"],[]]]'
BAD: dict[str, tuple[Callable[[dict[str, bytes]], object], bool, str]] = {
    "a changed byte": (lambda parts: parts.update({RECORDS: parts[RECORDS] + b"\n"}), False, "checksum"),
    "a name that leads out": (lambda parts: parts.update({"../evil": b""}), True, "no part of a database"),
    "an absolute name": (lambda parts: parts.update({"/tmp/evil": b""}), True, "no part of a database"),
    "no manifest": (lambda parts: parts.pop("manifest.json"), False, "no manifest.json"),
    "no decisions": (lambda parts: parts.pop("verdicts.json"), True, "no verdicts.json"),
    "another format": (lambda parts: claims(parts, format=2), True, "format 2"),
    "a folder that leads out": (lambda parts: claims(parts, folder="../x"), True, "no name of a database"),
    "another device's name": (lambda parts: claims(parts, folder="llvm-mine"), True, "no name of a database"),
    "a record that brings code": (
        lambda parts: parts.update({RECORDS: f"[0,[[{EXTERN},[]],[1.0],null,null]]\n".encode()}), True, "annotation",
    ),
    "a record of no kernel": (lambda parts: parts.update({WORKLOADS: b""}), True, "is not there"),
    "a promoted kernel without record": (
        lambda parts: parts.update(dict.fromkeys(FILES, b"")), True, "has no record",
    ),
    "a bomb": (lambda parts: parts.update({RECORDS: b" " * (files.MOST_BYTES + 1)}), True, "larger than"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_good_is_refused_before_anything_is_written(kind: str, folder: Path, tmp_path: Path) -> None:
    change, honest, words = BAD[kind]
    path = tmp_path / "one.tbdb"
    archive.write(folder, path)
    repacked(path, change, honest)
    with pytest.raises(TuneBenchError, match=words):
        archive.unpack(path, tmp_path / "there")
    assert not list((tmp_path / "there").glob("*"))
    assert not (tmp_path / "evil").exists()


def test_a_link_in_an_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.tbdb"
    archive.write(folder, path)
    with zipfile.ZipFile(path) as given:
        parts = {name: given.read(name) for name in given.namelist()}
    with zipfile.ZipFile(path, "w") as made:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name == RECORDS else stat.S_IFREG) | 0o644) << 16
            made.writestr(info, data)
    with pytest.raises(TuneBenchError, match="is a link"):
        archive.unpack(path, tmp_path / "there")


@pytest.mark.parametrize("data", [b"", b"PK\5\6" + b"\0" * 18, b"no zip at all, but some bytes of text"])
def test_another_file_is_no_archive(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tbdb").write_bytes(data)
    with pytest.raises(TuneBenchError, match="cannot read"):
        archive.read(tmp_path / "x.tbdb")


def test_a_long_list_of_members_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.tbdb", "w") as made:
        for number in range(200):
            made.writestr(f"{number}", b"")
    with pytest.raises(TuneBenchError, match="a few members"):
        archive.read(tmp_path / "x.tbdb")


def test_a_cut_archive_is_refused_wherever_it_ends(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.tbdb"
    archive.write(folder, path)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        with pytest.raises(TuneBenchError):
            archive.read(path)


# -- another device's ---------------------------------------------------------------------------------------


def test_a_database_of_another_cpu_is_named(
    made: Provenance, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(made, device="Another CPU (k8)")
    where = write(tmp_path / "tuning_logs" / folder_name("llvm", other), other, {})
    session = inputs.open_session("llvm", 2, tmp_path, "local")
    inputs.say_others(session)
    out = " ".join(capsys.readouterr().out.split())
    assert str(where) in out
    assert "not used in a bench" in out
    write(session.database().folder, session.database().made, {})
    inputs.say_others(session)
    assert capsys.readouterr().out == ""
