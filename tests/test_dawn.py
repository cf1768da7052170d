"""Dawn, Chrome's WebGPU, on a device that checks and runs nothing, and on the SwiftShader that comes with Chromium."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from conftest import need
from test_gpu_api import MATRIX_GPU, OPERATIONS, PRODUCTS, compare_tokens, draws, plain, time_right_and_wrong

from tunebench.errors import TuneBenchError
from tunebench.runtime.apis import Call, dawn
from tunebench.runtime.apis.dawn import DawnDevice
from tunebench.runtime.plan import Shader

DOUBLE = Shader(
    "main",
    """@group(0) @binding(0) var<storage, read> a : array<u32>;
@group(0) @binding(1) var<storage, read_write> y : array<u32>;
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) i : vec3u) { y[i.x] += a[i.x] * 2; }
""",
    (64, 1, 1),
    (False, True),
)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DawnDevice]:
    """SwiftShader's, also for processes that are started meanwhile."""
    need(dawn.find)
    library = Path("/usr/lib/chromium/libvk_swiftshader.so")
    if not library.exists():
        pytest.skip("there is no SwiftShader here")
    icd = tmp_path_factory.mktemp("icd") / "swiftshader.json"
    found = {"file_format_version": "1.0.0", "ICD": {"library_path": str(library), "api_version": "1.0.5"}}
    icd.write_text(json.dumps(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VK_DRIVER_FILES", str(icd))
        patch.setenv("VK_ICD_FILENAMES", str(icd))
        opened = dawn.open_device()
        assert isinstance(opened, DawnDevice)
        yield opened


@pytest.fixture(scope="module")
def target(device: DawnDevice) -> tvm.target.Target:
    """TVM's target for it."""
    return tvm.target.Target(device.target())


def test_dawn_takes_what_templates_write() -> None:
    device = DawnDevice(*need(dawn.find), ("backend=null", dawn.OPTIONS[0]))
    compiled = 0
    fused = replace(OPERATIONS["one row"], residual=False, norm=1e-5, gate=True)
    for op in (*PRODUCTS.values(), *OPERATIONS.values(), fused):
        for program in draws(op, MATRIX_GPU, 3):
            for shader in program.shaders.values():
                device.compile(shader)
                compiled += 1
    assert compiled > 30


def test_launches_run_in_order_as_often_as_they_are_recorded(device: DawnDevice) -> None:
    kernel, (a, y) = device.compile(DOUBLE), (device.allocate(256), device.allocate(256))
    device.write(a, np.arange(64, dtype=np.uint32))
    device.write(y, np.zeros(64, np.uint32))
    recording = device.record([Call(kernel, [a, y], (1, 1, 1)), Call(kernel, [y, a], (1, 1, 1))], 2)
    recording.run()
    first, second = np.arange(64), np.zeros(64, int)
    for _ in range(2):
        second = second + 2 * first
        first = first + 2 * second
    assert (device.read(a, 256).view(np.uint32) == first).all()
    assert (device.read(y, 256).view(np.uint32) == second).all()
    device.copy(a, y, 256)
    assert (device.read(a, 256).view(np.uint32) == second).all()
    assert recording.elapsed_ns() > 0
    device.wait()


def test_what_is_dropped_here_is_freed_over_there(device: DawnDevice) -> None:
    gc.collect()
    device.wait()
    before = device.ask("held")
    buffers = [device.allocate(1 << 20) for _ in range(10)]
    assert device.ask("held") == before + 10
    del buffers
    gc.collect()
    device.wait()
    assert device.ask("held") == before


def test_wrong_source_says_where_and_harms_nothing(device: DawnDevice) -> None:
    with pytest.raises(RuntimeError, match=r"WGSL: line 1: .*expected"):
        device.compile(Shader("main", "fn main( {", (1, 1, 1), (True,)))
    device.compile(DOUBLE)


def test_a_launch_that_fails_is_told_by_the_next_question() -> None:
    device = DawnDevice(*need(dawn.find), ("backend=null",))
    device.tell("run", 12345)
    with pytest.raises(RuntimeError):
        device.wait()


def test_a_process_that_has_ended_is_an_error() -> None:
    device = DawnDevice(*need(dawn.find), ("backend=null",))
    device.process.kill()
    with pytest.raises(RuntimeError, match="ended"):
        device.wait()


def test_a_plan_says_the_tokens_that_the_cpu_says(
    device: DawnDevice, target: tvm.target.Target, tmp_path: Path
) -> None:
    compare_tokens(device, target, tmp_path, "q4f32_1")


def test_a_runner_times_right_kernels_and_refuses_wrong_ones(device: DawnDevice, target: tvm.target.Target) -> None:
    op = replace(OPERATIONS["norm"], dtype="float32")
    time_right_and_wrong("dawn", target, plain(op), plain(replace(op, epsilon=9.0)))


def test_without_dawn_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dawn, "find_package", lambda: None)
    with pytest.raises(TuneBenchError, match="npm install webgpu"):
        dawn.open_device()


def test_a_process_that_ends_at_once_is_one_line() -> None:
    with pytest.raises(TuneBenchError, match="Dawn's process does not start"):
        dawn._start([sys.executable, "-c", "pass"])
