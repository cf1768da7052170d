"""The commands: a mistake is one line and exit code 2; a whole run on the tiny model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import write_config
from rich.text import Text
from safetensors.numpy import save_file

from tunebench import environment, installation, results
from tunebench.cli import app, benching, inputs
from tunebench.devices import cpu_probe, probe
from tunebench.errors import NOT_TEXT
from tunebench.model import quantization
from tunebench.results import Result, TuneResult
from tunebench.spec import Workload

SHAPE = ["--prompt", "32", "--context", "128"]
SHORT = ["-p", "21", "-n", "4"]


def run(arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """`main()` with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tunebench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        app.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "-m", "llama-7"], ["unknown model 'llama-7'", "Did you mean 'llama-7b'", "tinyllama-1.1b"]),
        (["bench", "-m", "demo", "-q", "q4f16_2"], ["unknown scheme", "Did you mean 'q4f16_", "q8f16_1"]),
        (["bench", "-m", "demo", "--target", "lvm"], ["unknown target", "Did you mean 'llvm'", "x86-64-v3"]),
        (["compile", "-m", "demo", "--target", "rocm"], ["cannot compile for target 'rocm'", "device libraries"]),
        (["tune", "-m", "demo", "--target", "hexagon"], ["no device for hexagon on this machine", "tunebench compile"]),
        (["bench", "-m", "demo", "--schedule", "tune"], ["unknown schedule", "Did you mean 'tuned'", "default"]),
        (["list", "model"], ["unknown list 'model'", "Did you mean 'models'", "schemes"]),
        (["bench", "-m", "nowhere/config.json"], ["no model config at", "demo"]),
        (["bench", "-m", "demo", "-p", "12,x"], ["-p", "'12,x'", "like 128,512"]),
        (["bench", "-m", "demo", "-p", "0", "-n", "0"], ["no test is left"]),
        (["bench", "-m", "demo", "-p", "9" * 5000], ["-p '999", "out of range", "from 0 to 1,048,576"]),
        (["bench", "-m", "demo", "-n", ",".join("1" * 65)], ["-n '1,1", "out of range", "at most 64 numbers"]),
        (["bench", "-m", "demo", "-p", "\u0663"], ["not a list of whole numbers"]),
        (["bench", "-m", "demo", "--sample-limit", "9" * 500], ["is too long", "at most 720h"]),
        (["bench", "-m", "x" * 5000], ["unknown model 'xxx"]),
        (["bench", "-m", "\x1b[31mred"], ["unknown model '\\x1b[31mred'"]),
        (["bench", "-m", "demo", "-p", "300", "--context", "128"], ["pp300 needs 300 positions", "--context"]),
        (["tune", "-m", "demo", "--time-limit", "soon"], ["'soon' is no duration", "20m"]),
        (["tune", "-m", "demo", "--phase", "prompt"], ["no phase 'prompt'", "decode, prefill or both"]),
        (["report", "nowhere"], ["no results at", "tunebench bench"]),
        (["bench", "-m", "demo", "--engine", "llama"], ["unknown engine", "Did you mean 'llama_cpp'", "torch"]),
        (["import", "nowhere.json"], ["cannot read nowhere.json", "llama-bench"]),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments, monkeypatch) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no model config"),
        ('{"hidden_size": 64}', "model_type"),
        ('{"model_type": "llama", "hidden_size": 64}', "num_hidden_layers"),
        ('{"model_type": "lama"}', "Did you mean 'llama'"),
    ],
)
def test_json_that_is_no_model(
    text: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert run(["bench", "-m", tmp_path / "config.json", "--work-dir", tmp_path], monkeypatch) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("made", "words"), [({}, "lacks "), ({"model.norm.weight": 7}, "lacks model.layers.0")])
def test_weights_that_do_not_fit(
    made: dict[str, int],
    words: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    arrays = {name: np.ones(size, np.float32) for name, size in made.items()} or {"other": np.ones(3, np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    only_default = ["--schedule", "default", "--weights", tmp_path, "--work-dir", tmp_path / "work"]
    assert run(["bench", "-m", config, "-q", "q0f32", *SHAPE, *SHORT, *only_default], monkeypatch) == 2
    assert words in capsys.readouterr().err


def test_a_work_dir_that_cannot_be_written(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for command in (["tune", *SHAPE], ["bench", *SHAPE, *SHORT, "--schedule", "default"]):
        assert run([*command, "-m", config, "-q", "q0f32", "--work-dir", tmp_path / "file" / "x"], monkeypatch) == 2
        assert "cannot write to" in capsys.readouterr().err


def test_too_little_memory(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "available_memory_bytes", lambda: 1 << 20)
    assert run(["bench", "-m", config, *SHAPE, *SHORT, "--work-dir", tmp_path], monkeypatch) == 2
    assert "GiB are free" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["tune", "--help"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    script = f"""
import sys
from tunebench.cli import app
sys.argv = ["tunebench", *{arguments!r}]
try:
    app.main()
except SystemExit as error:
    assert not error.code
print("slow:", sorted({{"tvm", "pandas", "numpy", "matplotlib", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "slow: []" in done.stdout


def test_tune_bench_report(tmp_path: Path, small_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_probe, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "SAMPLE_S", 0.001)
    common = ["-m", write_config(tmp_path), "-q", "q4f16_1", "--layers", "1", *SHAPE, "--threads", "2"]
    common += ["--work-dir", tmp_path / "work"]
    assert run(["tune", *common, "--trials", "2", "--time-limit", "60s", "--no-bench"], monkeypatch) == 0
    folder = tmp_path / "work" / "reports" / "local"
    (tuned,) = results.read(folder / "results.jsonl")[0]
    won = any(kernel.decision == "promoted" for kernel in tuned.kernels)
    schedules = [] if won else ["--schedule", "default"]
    assert run(["bench", *common, *SHORT, "-d", "0,40", "-r", "3", *schedules], monkeypatch) == 0
    limited = ["bench", *common, "-p", "21", "-n", "0", "--schedule", "default", "--sample-limit", "0s"]
    assert run(limited, monkeypatch) == 0
    rows, warnings = results.read(folder / "results.jsonl")
    assert warnings == []
    check_tuning([row for row in rows if isinstance(row, TuneResult)])
    cases = [row for row in rows if isinstance(row, Result)]
    check_cases([row for row in cases if row.status == "ok"])
    assert {row.layers for row in cases} == {1}
    assert {row.model_id for row in rows} == {tuned.model_id}
    left_out = [row for row in cases if row.status != "ok"]
    assert [(row.status, row.test) for row in left_out] == [("not_run", "pp21")]
    assert "--sample-limit" in left_out[0].reason
    assert left_out[0].samples_ns == []
    assert run(["report", "--work-dir", tmp_path / "work"], monkeypatch) == 0
    assert {"report.md", "report.html", "summary.csv", "charts"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.jsonl").read_text().splitlines()[0])["kind"] == "tune"


def test_a_demo_ends_with_a_report_where_nothing_was_won(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow machine may not get that far in the time."""
    workload = Workload(str(config), quantization.schemes()["q0f32"], chunks=(16,), context=128)
    benched, reported = [], []
    monkeypatch.setattr(installation, "smollm2", lambda: None)
    monkeypatch.setattr(app, "tune_command", lambda *_, **__: None)
    monkeypatch.setattr(app.inputs, "workloads", lambda *_: [workload])
    monkeypatch.setattr(benching, "bench_all", lambda models, plan, **_: benched.append((len(models), plan.schedules)))
    monkeypatch.setattr(app, "report_command", lambda **given: reported.append(given["name"]))
    assert run(["demo", "--work-dir", tmp_path], monkeypatch) == 0
    assert (benched, reported) == ([(1, ("default",))], ["demo"])


def check_tuning(rows: list[TuneResult]) -> None:
    """One run, its cost and its decisions."""
    (row,) = rows
    assert row.trials >= row.valid_trials > 0
    assert row.cost_s["total"] > 0
    assert row.curve
    assert all(kernel.reason for kernel in row.kernels)
    for chunk in {kernel.chunk for kernel in row.kernels}:
        assert sum(k.share for k in row.kernels if k.chunk == chunk) == pytest.approx(1)


def check_cases(rows: list[Result]) -> None:
    """Every test has all that a report needs."""
    assert {row.test for row in rows} == {"pp21", "tg4", "pp21 @ d40", "tg4 @ d40"}
    for row in rows:
        assert len(row.samples_ns) == 3
        assert row.warmup_ns
        assert {"weights", "kv_cache", "peak"} <= set(row.memory)
        assert all(count.counter and count.bytes for count in row.memory.values())
        assert row.coverage is not None
        assert 0 <= row.coverage <= 1 + 1e-9
        assert (row.schedule == "tuned") or row.coverage == 0
        assert min(row.probe.values()) > 0
        assert set(row.conditions) == {"start", "end"}
        assert all("clock_hz" in state for state in row.conditions.values())
        assert set(row.throttled) <= set(range(3))
        assert all(kernel.reason for kernel in row.kernels)
        assert {kernel.chunk for kernel in row.kernels} <= {1, 16, 32}


def test_other_engines_stand_beside_ours(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_probe, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "SAMPLE_S", 0.001)
    arguments = ["-m", config, *SHAPE, "-p", "21", "-n", "4", "-r", "5", "--schedule", "default"]
    arguments += ["--engine", "tvm", "--engine", "torch", "--work-dir", tmp_path]
    assert run(["bench", *arguments, "-q", "q0f32", "-q", "q4f16_1"], monkeypatch) == 0
    rows = results.read(tmp_path / "reports" / "local" / "results.jsonl")[0]
    found = [(row.scheme, row.engine, row.schedule, row.test, row.status) for row in rows if isinstance(row, Result)]
    expected = [
        (scheme, engine, schedule, test, "ok" if scheme == "q0f32" or engine == "tvm" else "not_run")
        for scheme in ("q0f32", "q4f16_1")
        for test in ("pp21", "tg4")
        for engine, schedule in (("tvm", "default"), ("torch", "library"))
    ]
    assert found == expected
    for row in rows:
        assert isinstance(row, Result)
        assert bool(row.samples_ns) == (row.status == "ok")
        if row.status == "ok":
            assert row.memory["weights"].bytes
            assert row.memory["peak"].bytes


LLAMA_BENCH = {
    "build_commit": "b5a3",
    "cpu_info": "AMD EPYC",
    "gpu_info": "",
    "backends": "CPU",
    "model_filename": "models/llama-7b.gguf",
    "model_type": "llama 7B Q4_0",
    "model_size": 3791273984,
    "model_n_params": 6738415616,
    "n_threads": 2,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": 99,
    "n_prompt": 0,
    "n_gen": 64,
    "n_depth": 512,
    "test_time": "2026-01-01T00:00:00Z",
    "avg_ns": 6_000_000_000,
    "samples_ns": [5_900_000_000, 6_000_000_000, 6_100_000_000],
}


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_rows_of_llama_bench_are_read(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [LLAMA_BENCH, {**LLAMA_BENCH, "n_prompt": 512, "n_gen": 0, "n_depth": 0}]
    path = tmp_path / f"bench.{form}"
    path.write_text(json.dumps(rows, indent=1) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert run(["import", path, "--work-dir", tmp_path], monkeypatch) == 0
    first, second = results.read(tmp_path / "reports" / "local" / "results.jsonl")[0]
    assert isinstance(first, Result)
    assert (first.model, first.scheme, first.engine, first.device) == ("llama-7b", "Q4_0", "llama_cpp", "AMD EPYC")
    assert (first.test, first.batch, first.n_threads) == ("tg64 @ d512", 1, 2)
    assert results.tokens_per_s(first) == pytest.approx([64 / 5.9, 64 / 6.0, 64 / 6.1])
    assert isinstance(second, Result)
    assert second.test == "pp512"
    assert run(["report", "--work-dir", tmp_path], monkeypatch) == 0
    assert "Q4_0" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '{"n_prompt": 1}'])
def test_other_files_are_not_imported(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(text)
    assert run(["import", tmp_path / "other.json", "--work-dir", tmp_path], monkeypatch) == 2
    assert "llama-bench" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(("name", "value"), [("n_gen", "64"), ("n_threads", -1), ("samples_ns", [0])])
def test_a_row_of_llama_bench_that_does_not_fit_is_named(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (LLAMA_BENCH, {**LLAMA_BENCH, name: value})))
    assert run(["import", path, "--work-dir", tmp_path], monkeypatch) == 2
    printed = capsys.readouterr().err
    assert f"{path}, row 2 is none of llama-bench's" in printed
    assert f"$.{name}" in printed


def test_a_full_disk_leaves_nothing_of_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps({**LLAMA_BENCH, "n_gen": n}) + "\n" for n in (1, 2, 3)))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(["import", path, "--work-dir", tmp_path], monkeypatch) == 1
    printed = capsys.readouterr().err
    assert "no space left on" in printed
    assert printed.count("\n") == 1
    assert (tmp_path / "reports" / "local" / "results.jsonl").read_bytes() == b""


def test_a_terminal_obeys_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    console = inputs.PlainConsole()
    console.print("[red]a[/red] \x1b[2Jb\x1b]0;title\x07 \u202ec\x08\x9b", Text("d\x1b[31me", "bold"))
    printed = capsys.readouterr().out
    assert NOT_TEXT.search(printed) is None
    assert printed.startswith("[red]a[/red] ")
    assert printed.endswith(" c de\n")
