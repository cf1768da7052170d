"""Rows: what is appended is read back, and a file that is torn, newer or foreign does not stop the reader."""

import errno
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tunebench import results
from tunebench.errors import TuneBenchError
from tunebench.results import Result, TuneResult
from tunebench.spec import Count, Kernel

KERNEL = Kernel("matmul", "decode", 1, 22, 0.5, "tuned", "faster", "promoted", [20, 21], [10, 11], {"tuned": [10, 11]})
ROW = Result(
    model="tinyllama-1.1b",
    scheme="q4f16_1",
    schedule="tuned",
    engine="tvm",
    target="llvm",
    device="cpu",
    test="pp8+tg4",
    n_prompt=8,
    n_gen=4,
    n_depth=0,
    batch=2,
    n_threads=8,
    status="ok",
    run_id="run-1",
    samples_ns=[10**9, 2 * 10**9, 4 * 10**9],
    memory={"weights": Count(600, "array sizes"), "peak": Count(None, "none")},
    kernels=[KERNEL],
    probe={"read_bytes_per_s": 5e10},
    environment={"cpu": "Example", "versions": {"tvm": "0.27"}},
)
TUNE = TuneResult("m", "q0f16", "llvm", "cpu", 1, 8, trials=64, curve=[{"wall_s": 1.0}], kernels=[KERNEL])
LLAMA_BENCH = (
    "model_type model_size model_n_params n_threads n_prompt n_gen n_depth test_time "
    "build_commit cpu_info backends model_filename n_batch n_ubatch type_k type_v "
    "avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts"
)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    for row in (ROW, TUNE):
        results.append(path, row)
    assert results.read(path) == ([ROW, TUNE], [])


@given(samples=st.lists(st.integers(1, 2**60), min_size=1), reason=st.text(), coverage=st.none() | st.floats(0, 1))
def test_any_row_comes_back(
    tmp_path_factory: pytest.TempPathFactory, samples: list[int], reason: str, coverage: float | None
) -> None:
    path = tmp_path_factory.mktemp("rows") / "results.jsonl"
    row = replace(ROW, samples_ns=samples, reason=reason, coverage=coverage)
    results.append(path, row)
    results.append(path, row)
    assert results.read(path) == ([row, row], [])


class Word(str):
    """A string of somebody else's, as TVM's names are."""


def test_what_is_not_quite_a_string_or_a_number_is_written_as_one(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, replace(ROW, device=Word("cpu"), probe={Word("read_bytes_per_s"): np.float64(5e10)}))
    assert results.read(path) == ([ROW], [])
    with pytest.raises(TypeError, match="no form in JSON"):
        results.append(path, replace(ROW, environment={"cpu": object()}))
    assert results.read(path) == ([ROW], [])


def test_a_torn_last_line_is_left_out_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    rows, warnings = results.read(path)
    assert rows == [ROW]
    assert len(warnings) == 1
    assert f"{path}:2" in warnings[0]
    results.append(path, TUNE)
    rows, warnings = results.read(path)
    assert rows == [ROW, TUNE]
    assert len(warnings) == 1


def test_a_newer_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, replace(ROW, schema_version=results.SCHEMA_VERSION + 1))
    results.append(path, ROW)
    rows, warnings = results.read(path)
    assert rows == [ROW]
    assert "newer" in warnings[0]
    assert "upgrade TuneBench" in warnings[0]


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    data = lines(path)[0] | {"n_batch": 2048, "build_commit": "abc"}
    path.write_text(json.dumps(data) + "\n\n")
    assert results.read(path) == ([ROW], [])


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("status", "lost", "Invalid enum value 'lost' - at `$.status`"),
        ("kind", "trace", "Invalid value 'trace' - at `$.kind`"),
        ("n_gen", -1, "Expected `int` >= 0 - at `$.n_gen`"),
        ("n_gen", "4", "Expected `int`, got `str` - at `$.n_gen`"),
        ("samples_ns", [1.5], "$.samples_ns[0]"),
        ("samples_ns", [7, 0], "$.samples_ns[1]"),
        ("kernels", [{"task": "t"}], "Object missing required field `phase` - at `$.kernels[0]`"),
        ("memory", {"peak": {"bytes": -1, "counter": ""}}, "$.memory[...].bytes"),
    ],
)
def test_a_field_that_does_not_fit_is_named(place: str, value: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    results.append(path, TUNE)
    first, second = lines(path)
    path.write_text(json.dumps({**first, place: value}) + "\n" + json.dumps(second) + "\n")
    rows, warnings = results.read(path)
    assert rows == [TUNE]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{path}:1: ")
    assert words in warnings[0]


def test_committed_rows_are_read() -> None:
    paths = sorted((Path(__file__).parent.parent / "reports").glob("*/results.jsonl"))
    found = {path.parent.name: results.read(path) for path in paths}
    assert all(rows and not warnings for rows, warnings in found.values())
    kernels = [kernel for rows, _ in found.values() for row in rows for kernel in row.kernels]
    assert {kernel.decision for kernel in kernels} == {"promoted", "kept default", "inconclusive", ""}
    assert {kernel.chunk for kernel in kernels} >= {1, 16, 128, 512}


def test_a_chunk_was_a_bucket_in_schema_1(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    old = replace(TUNE, schema_version=1, model='"bucket": 1')
    results.append(path, old)
    text = path.read_text()
    path.write_text(text.replace('"chunk":1', '"bucket": 1'))
    assert path.read_text() != text
    assert results.read(path) == ([old], [])


@pytest.mark.parametrize("line", ["[]", "1", "null", "{}", '{"schema_version": 1, "kind": "case"}', "\x00"])
def test_a_foreign_line_is_a_warning(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    rows, warnings = results.read(path)
    assert rows == []
    assert len(warnings) == 1


def test_a_missing_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match="no results at"):
        results.read(tmp_path / "none.jsonl")


def test_the_fields_of_llama_bench_are_there(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    data = lines(path)[0]
    assert set(LLAMA_BENCH.split()) <= set(data)
    assert data["samples_ts"] == [24.0, 12.0, 6.0]
    assert data["avg_ts"] == pytest.approx(14)
    assert data["stddev_ts"] == pytest.approx(statistics.stdev([24, 12, 6]))
    assert data["avg_ns"] == round(7e9 / 3)


def test_a_row_without_samples_has_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, replace(ROW, status="failed", reason="out of memory", samples_ns=[]))
    results.append(path, TUNE)
    assert all("avg_ts" not in line for line in lines(path))


def test_tokens_per_s_counts_the_whole_batch() -> None:
    assert results.tokens_per_s(ROW) == [24.0, 12.0, 6.0]


@pytest.mark.parametrize("torn", ["", '{"model":"m","sch', '{"model":"m","memory":'])
def test_rows_glued_into_a_line_are_told_apart(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW, TUNE)
    path.write_text(torn + path.read_text().replace("\n", "") + "\n")
    rows, warnings = results.read(path)
    assert rows == [ROW, TUNE]
    assert [warning.split(": ")[0] for warning in warnings] == ([f"{path}:1"] if torn else [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_prompt": 2**62 + 1}, "n_prompt"),
        ({"samples_ns": [5] * 1001}, "samples_ns"),
        ({"samples_ns": []}, "there are no samples"),
        ({"n_prompt": 0, "n_gen": 0}, "n_prompt and n_gen are 0"),
        ({"throttled": [3]}, "throttled"),
        ({"noise": -0.1}, "noise"),
        ({"probe": {"flops_per_s": 1e300}}, "probe"),
        ({"model": "m" * 70_000}, "model"),
        ({"environment": {"a": [[[[[[[[[1]]]]]]]]]}}, "nested too deeply"),
        ({"environment": {"a": 10**200}}, "2^63"),
        ({"settings": {"poll": -(10**30)}}, "2^63"),
    ],
)
def test_what_no_run_measures_is_left_out(change: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    (row,) = lines(path)
    path.write_text(json.dumps({**row, **change}) + "\n" + json.dumps(row) + "\n")
    rows, (warning,) = results.read(path)
    assert rows == [ROW]
    assert warning.startswith(f"{path}:1: ")
    assert words in warning


@pytest.mark.parametrize(
    "line", [b'{"a":' + b"[" * 100_000, b"\xff" * 10, b"x" * 100, b'{"model":"\\ud800"}', b"[NaN]"]
)
def test_any_line_leaves_the_others(line: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "LINE_BYTES", 1 << 17)
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    path.write_bytes(b"\n".join([line, b"y" * (3 << 16), path.read_bytes() * 30, *[line] * 40]))
    rows, warnings = results.read(path)
    assert rows == [ROW] * 30
    assert len(warnings) == results.MOST_WARNINGS + 1
    assert warnings[1].startswith(f"{path}:2: ")
    assert warnings[-1].endswith("more lines left out")
    assert not any("\n" in warning or len(warning) > 500 for warning in warnings)


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)
    monkeypatch.setattr(results, "FILE_BYTES", 10)
    with pytest.raises(TuneBenchError, match="larger than"):
        results.read(path)
    with pytest.raises(TuneBenchError, match="no results at"):
        results.read(tmp_path)
    with pytest.raises(TuneBenchError, match="cannot write to"):
        results.append(tmp_path, ROW)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, ROW)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TuneBenchError, match=r"no space left on .* nothing was lost"):
            results.append(path, TUNE, ROW)
    assert results.read(path) == ([ROW], [])
    results.append(path, TUNE, ROW)
    assert results.read(path) == ([ROW, TUNE, ROW], [])


APPENDS = """
import sys
from pathlib import Path
from tunebench import results
(row,), _ = results.read(Path(sys.argv[1]))
for _ in range(50):
    results.append(Path(sys.argv[2]), row, row)
"""


def test_two_processes_append_whole_rows(tmp_path: Path) -> None:
    row = replace(ROW, reason="x" * 50_000)
    results.append(tmp_path / "row.jsonl", row)
    command = [sys.executable, "-c", APPENDS, str(tmp_path / "row.jsonl"), str(tmp_path / "both.jsonl")]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert results.read(tmp_path / "both.jsonl") == ([row] * 200, [])
