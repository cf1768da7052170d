"""A machine with Python and nothing else: every command ends with a result or one clear line, every time it is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_config

from tunebench.errors import TuneBenchError, remembered

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="drivers can be hidden on Linux only"),
    pytest.mark.xdist_group("bare machine"),
]

PACKAGES = ("wgpu", "pyopencl", "playwright", "cuda", "nvidia", "llama_cpp", "gguf", "torch")  # of the extras
RESULTS = {  # what is shown without any device, and words of it
    "list targets": "AMD's GPUs",
    "list engines": "llama_cpp",
    "list models": "tinyllama-1.1b",
    "list spaces": "cpu-gemm",
    "devices": "instructions",
    "demo --help": "--time-limit",
    "bench -m tiny.json -q q0f32 --schedule default -p 16 -n 0 -r 1 --prompt 16 --context 64": "tokens/s",
    "report": "Written:",
    "db ls": "cuda-nvidia-h200",
    "db show cuda-nvidia-h200 matmul_16bit_512x12288": "template cublas: blocks 1",
    "db verify cuda-nvidia-h200": "Outputs were not checked: NVIDIA H200 is not here",
    "db diff cuda-nvidia-h200 cuda-nvidia-h100-80gb-hbm3": "29 same record",
    "db export cuda-nvidia-h200 h200.tbdb": "Written: h200.tbdb, 6 parts of cuda-nvidia-h200",
    "db merge cuda-nvidia-h200 --into merged/cuda-nvidia-h200": "Written: merged/cuda-nvidia-h200, 110 kernels",
    "compile -m tiny[red].json --target rpi5 --prompt 16 --context 64": "tiny[red].json q4f16_1 for rpi5",  # no markup
}
LINES = {  # what is refused, and words of the line
    "tune -m demo --target webgpu": "Install a Vulkan driver",
    "tune -m demo --target vulkan": "Install a Vulkan driver",
    "tune -m demo --target dawn": "Install ",
    "tune -m demo --target opencl": "Install a driver, e.g. PoCL",
    "tune -m demo --target cuda": "no NVIDIA GPU",
    "tune -m demo --target metal": "no Metal device",
    "tune -m demo --runner rpc --tracker 127.0.0.1:9 --key rpi4": "127.0.0.1:9",
    "bench -m demo --target cuda --target webgpu --target opencl": "no NVIDIA GPU",
    "bench -m demo --target webgpu --engine browser": "Install one: apt-get install chromium",
    "bench -m demo --schedule tuned": "nothing tuned for demo",
    "export -m demo --browser folder": "Install one: apt-get install chromium",
    "export -m demo folder": "Install a Vulkan driver",
    "browse nowhere": "nowhere",
    "quality -m demo": "demo has random weights",
    "generate -m demo --prompt x": "demo has random weights",
    "report nowhere": "no results at",
    "import nowhere.json": "cannot read nowhere.json",
    "db show nowhere": "there is no database in nowhere",
    "db import nowhere.tbdb": "cannot read nowhere.tbdb",
    "db prune cuda-nvidia-h200 --yes": "comes with TuneBench, and is only read",
    "db merge cuda-nvidia-h200 cuda-nvidia-h100-80gb-hbm3 --into both": "not for the same: device 'NVIDIA H100",
    "db merge cuda-nvidia-h200 --measure --into measured": "NVIDIA H200 is not here",
}
MISSING = {  # where the extras' packages are missing, too: what installs them
    "tune -m demo --target webgpu": "webgpu needs wgpu. Install it: ",
    "tune -m demo --target dawn": "dawn needs Node.js. Install Node.js",
    "tune -m demo --target opencl": "opencl needs pyopencl. Install it: ",
    "bench -m demo --target webgpu --engine browser": "needs playwright. Install it: ",
    "bench -m demo --engine llama_cpp": "needs llama_cpp and gguf. Install it: ",
    "compile -m tiny.json --target nvidia/nvidia-h100 --prompt 16 --context 64": "CUDA kernels need NVRTC",
}

_SCRIPT = """
import contextlib, io, json, sys
commands, missing = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(missing))
from tunebench.cli import app, inputs

def run(arguments):
    out, err = io.StringIO(), io.StringIO()
    inputs.console.file, sys.argv = out, ["tunebench", *arguments.split()]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as error:
            return [error.code or 0, out.getvalue(), err.getvalue()]

found = {each: [run(each), run(each)] for each in commands}
from tunebench.errors import TuneBenchError
from tunebench.runtime import apis
for name, api in apis.apis().items() if not missing else ():
    found[name] = []
    for _ in range(2):
        try:
            found[name].append(api.open().name)
        except TuneBenchError as error:
            found[name].append(str(error))
print(json.dumps(found))
"""
Found = dict[str, Any]


def run_twice(folder: Path, commands: list[str], missing: tuple[str, ...]) -> Found:
    """Each command twice in one process without drivers, programs and these packages: code, output, errors."""
    shutil.copy(write_config(folder, num_hidden_layers=1), folder / "tiny[red].json")
    hidden = dict.fromkeys(("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "OCL_ICD_VENDORS"), "/nonexistent")
    (folder / "bin").mkdir()
    environment = {**os.environ, **hidden, "PATH": str(folder / "bin"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([commands, missing])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def without_drivers(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_twice(tmp_path_factory.mktemp("bare"), [*RESULTS, *LINES], ())


@pytest.fixture(scope="module")
def without_packages(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run_twice(tmp_path_factory.mktemp("barest"), ["list targets", "devices", *MISSING], PACKAGES)


@pytest.mark.parametrize("command", RESULTS)
def test_a_command_without_a_device_shows_its_result(command: str, without_drivers: Found) -> None:
    for code, out, err in without_drivers[command]:
        assert (code, err) == (0, "")
        assert RESULTS[command] in out


@pytest.mark.parametrize("command", LINES)
def test_a_device_that_is_absent_is_the_same_line_twice(command: str, without_drivers: Found) -> None:
    is_one_line(without_drivers[command], LINES[command])


@pytest.mark.parametrize("command", MISSING)
def test_a_package_that_is_missing_is_the_same_line_twice(command: str, without_packages: Found) -> None:
    is_one_line(without_packages[command], MISSING[command])


def is_one_line(runs: list[tuple[int, str, str]], words: str) -> None:
    """Both runs refuse in the same words, with the exit code of a user's mistake."""
    (code, _, first), (_, _, second) = runs
    assert code == 2
    assert first.startswith("error: ")
    assert first.count("\n") == 1
    assert words in first
    assert first == second


def test_what_targets_need_is_listed(without_packages: Found) -> None:
    (code, targets, err), _ = without_packages["list targets"]
    assert (code, err) == (0, "")
    assert "webgpu needs wgpu" in " ".join(targets.split())
    devices = without_packages["devices"][0][1]
    assert "[opencl]" in devices  # what installs it, in brackets that are no markup


@pytest.mark.parametrize("api", ["webgpu", "dawn", "opencl"])
def test_an_opener_can_be_called_again(api: str, without_drivers: Found) -> None:
    first, second = without_drivers[api]
    assert "Install " in first
    assert first == second


def test_what_could_not_be_opened_is_remembered() -> None:
    calls = []

    @remembered
    def opened(name: str) -> str:
        calls.append(name)
        if name == "nothing":
            raise TuneBenchError("no device.", "Install a driver.")
        return name

    for _ in range(2):
        assert opened("device") == "device"
        with pytest.raises(TuneBenchError, match=r"^no device\. Install a driver\.$"):
            opened("nothing")
    assert calls == ["device", "nothing"]
