"""Arm: every design builds for every target, with the instructions it should have, and computes under emulation.

What runs is slow: `tests/arm_sysroot.sh` makes the emulated system, `pytest -m slow tests/test_arm.py` uses it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from conftest import THREADS, cpu_target, draw_designs, load_model, lower
from test_dot import inputs as dot_inputs
from test_dot import product
from tvm import rpc, s_tir
from tvm.rpc.tracker import Tracker
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import passes
from tunebench.compile.tasks import replay
from tunebench.kernels import int8_dot
from tunebench.model.workload import Model
from tunebench.runners import bench
from tunebench.tuning.spaces import Kernel, cpu_dot

SYSROOT = Path(__file__).parent.parent / ".arm-sysroot"
LINKER = "aarch64-linux-gnu-ld"
START_S = 300.0
SCHEMES = ("q0f32", "q4f16_0", "q4f16_1", "q4i8f16_0", "q8i8f16_0")
EMULATED = {  # CPU as QEMU names it -> the targets whose kernels it must run
    "cortex-a72": ("rpi4",),
    "cortex-a76": ("rpi5", "android-v8"),
    "max": ("graviton3", "graviton4", "android-v9"),
}
INSTRUCTIONS = [  # target, weight bits, TensorIntrin, mnemonic
    ("rpi4", 4, "tunebench.dot.neon", "smull"),
    ("rpi4", 8, "tunebench.dot.neon.wide", "smull"),
    ("rpi5", 4, "tunebench.dot.dotprod", "sdot"),
    ("rpi5", 8, "tunebench.dot.dotprod.wide", "sdot"),
    ("apple-m1", 8, "tunebench.dot.dotprod.wide", "sdot"),
    ("apple-m2", 8, "tunebench.dot.i8mm", "usdot"),
    ("graviton3", 4, "tunebench.dot.i8mm", "usdot"),
    ("graviton4", 8, "tunebench.dot.i8mm", "usdot"),
    ("android-v8", 4, "tunebench.dot.dotprod", "sdot"),
    ("android-v9", 8, "tunebench.dot.i8mm", "usdot"),
]
Arrays = Sequence[np.ndarray]


def dot_designs(name: str, rows: int, bits: int) -> list[s_tir.Schedule]:
    """Every design of a product with int8 activations, for a target."""
    target = cpu_target(name)
    dots = {bits: int8_dot.instruction(target, bits)}
    kernel = Kernel(("unpack", "dot", "matmul", "out"), 4, THREADS, dots, int8_dot.matrix_instruction(target))
    return cpu_dot.SPACES[0].generate(s_tir.Schedule(product(rows, bits)), kernel)


@pytest.mark.parametrize(("name", "bits", "intrinsic", "mnemonic"), INSTRUCTIONS)
def test_a_target_multiplies_bytes_with_its_best_instruction(
    name: str, bits: int, intrinsic: str, mnemonic: str
) -> None:
    target = cpu_target(name)
    assert int8_dot.instruction(target, bits) == intrinsic
    assert mnemonics(dot_designs(name, 1, bits)[0], target)[mnemonic]


@pytest.mark.parametrize("bits", [4, 8])
def test_pairs_of_rows_are_multiplied_as_matrices(bits: int) -> None:
    target = cpu_target("graviton3")
    designs = [mnemonics(design, target) for design in dot_designs("graviton3", 2, bits)]
    (paired,) = [found for found in designs if found["usmmla"]]
    assert not paired["usdot"]
    assert paired["uzp1"] < paired["usmmla"]  # sums stay as the instruction leaves them until a group is done
    assert not any(mnemonics(design, target)["usmmla"] for design in dot_designs("graviton3", 1, bits))
    assert not int8_dot.matrix_instruction(cpu_target("rpi5"))


def test_a_record_of_them_replays(tmp_path: Path) -> None:
    design, mod = dot_designs("graviton3", 2, 8)[-1], tvm.IRModule({"main": product(2, 8)})
    paths = str(tmp_path / "workload.json"), str(tmp_path / "record.json")
    written = ms.database.JSONDatabase(*paths)
    workload = written.commit_workload(mod)
    arguments = ms.arg_info.ArgInfo.from_entry_func(mod, remove_preproc=True)
    written.commit_tuning_record(
        ms.database.TuningRecord(design.trace, workload, [1e-3], cpu_target("graviton3"), arguments)
    )
    (record,) = ms.database.JSONDatabase(*paths).get_all_tuning_records()
    assert int8_dot.MATRIX in str(record.trace)
    assert tvm_ffi.structural_equal(replay(mod, record), design.mod)


def mnemonics(design: s_tir.Schedule, target: tvm.target.Target) -> Counter[str]:
    """How often each instruction is in a kernel's machine code."""
    code = tvm.compile(design.mod, target=target).mod.inspect_source("asm")
    lines = (line.split() for line in code.splitlines() if line.startswith("\t"))
    return Counter(words[0].partition(".")[0] for words in lines if words)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("rpi4", "q4f16_1"), ("rpi5", "q8i8f16_0"), ("graviton3", "q4i8f16_0"), ("apple-m2", "q4f16_0")],
)
def test_every_design_builds(name: str, scheme: str, config: Path) -> None:
    modules = drawn(load_model(config, scheme, chunks=(16,)), name, seeds=1)
    assert tvm.compile(together(modules), target=cpu_target(name)) is not None


def drawn(model: Model, name: str, seeds: int) -> dict[str, tvm.IRModule]:
    """Kernels of a model by `<task> <how>`: the default, and draws of every design for a target."""
    target, modules = cpu_target(name), {}
    for task in lower(model, target)[1]:
        modules[f"{task.name} default"] = passes.default_schedule(task.mod, target)
        for seed in range(seeds):
            for i, design in enumerate(draw_designs(task, target, seed)):
                modules[f"{task.name} design {i} seed {seed}"] = design.mod
    return modules


def together(modules: Mapping[str, tvm.IRModule]) -> tvm.IRModule:
    """Kernels as one module, `k0`, `k1` and so on."""
    functions = {f"k{i}": mod["main"].with_attr("global_symbol", f"k{i}") for i, mod in enumerate(modules.values())}
    return tvm.IRModule(functions)


@dataclass(frozen=True)
class Emulated:
    """A TVM RPC server on an emulated CPU."""

    cpu: str
    session: rpc.RPCSession

    def load(self, modules: Mapping[str, tvm.IRModule], name: str, folder: Path) -> dict[str, object]:
        """Compile kernels here for a target, and load them there."""
        library = folder / f"{folder.name}-{name}.so"  # never the name of one that is loaded there
        tvm.compile(together(modules), target=cpu_target(name)).export_library(str(library), fcompile=link)
        self.session.upload(str(library))
        loaded = self.session.load_module(library.name)
        return {name: loaded[f"k{i}"] for i, name in enumerate(modules)}


def link(output: str, objects: list[str], **_: object) -> None:
    """Make a shared library; what it leaves undefined the loading process has."""
    subprocess.run([LINKER, "-shared", "-o", output, *objects], check=True)


@pytest.fixture(scope="module", params=EMULATED)
def emulated(request: pytest.FixtureRequest) -> Iterator[Emulated]:
    for need in ("qemu-aarch64", LINKER):
        if not shutil.which(need):
            pytest.skip(f"{need} is not installed")
    if not (SYSROOT / "python").exists():
        pytest.skip("there is no .arm-sysroot: run tests/arm_sysroot.sh")
    tracker = Tracker("127.0.0.1", port=9390, port_end=9490)
    where = f"127.0.0.1:{tracker.port}"
    command = [SYSROOT / "python", "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--tracker", where]
    settings = {**os.environ, "QEMU_CPU": request.param, "TVM_NUM_THREADS": str(THREADS)}
    server = subprocess.Popen([*command, "--key", request.param], env=settings, start_new_session=True)
    try:
        yield Emulated(request.param, connect(tracker, request.param, server))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        tracker.terminate()


def connect(tracker: Tracker, key: str, server: subprocess.Popen[bytes]) -> rpc.RPCSession:
    """A session with the server, once it is up."""
    connection = rpc.connect_tracker("127.0.0.1", tracker.port)
    deadline = time.monotonic() + START_S
    while not connection.summary()["queue_info"].get(key, {}).get("free"):
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(1)
    return connection.request(key)


def call(kernel: object, arguments: Arrays, wanted: Sequence[int], device: tvm.runtime.Device) -> Arrays:
    """A kernel's outputs."""
    tensors = [tvm.runtime.tensor(array, device) for array in arguments]
    kernel(*tensors)  # type: ignore[operator]
    return [tensors[i].numpy() for i in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_compute_what_this_machines_do(scheme: str, emulated: Emulated, config: Path, tmp_path: Path) -> None:
    here = cpu_target()
    wrong = {}
    expected: dict[str, tuple[Arrays, list[int], Arrays]] = {}
    for task in lower(load_model(config, scheme), here)[1]:
        arguments = bench.random_inputs(task.mod, 40, np.random.default_rng(0))
        kernel = tvm.compile(passes.default_schedule(task.mod, here), target=here)["main"]
        wanted = bench.written(task.mod)
        expected[task.name] = arguments, wanted, call(kernel, arguments, wanted, tvm.cpu())
    for name in EMULATED[emulated.cpu]:
        kernels = emulated.load(drawn(load_model(config, scheme), name, seeds=2), name, tmp_path)
        for kernel_name, kernel in kernels.items():
            arguments, wanted, outputs = expected[kernel_name.split()[0]]
            found = call(kernel, arguments, wanted, emulated.session.cpu())
            why = [bench.too_far(*bench.distance(a, b), str(a.dtype)) for a, b in zip(found, outputs, strict=True)]
            if any(why):
                wrong[f"{name} {kernel_name}"] = why
        print(f"{emulated.cpu}: {len(kernels)} kernels of {scheme} for {name}")
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_bytes_are_exact(bits: int, extreme: bool, emulated: Emulated, tmp_path: Path) -> None:
    rows = 4
    arguments, expected = dot_inputs(rows, bits, extreme)
    out = np.zeros(expected.shape, np.float32)
    for name in EMULATED[emulated.cpu]:
        modules = {str(i): design.mod for i, design in enumerate(dot_designs(name, rows, bits))}
        for kernel in emulated.load(modules, name, tmp_path).values():
            (found,) = call(kernel, [*arguments, out], [len(arguments)], emulated.session.cpu())
            np.testing.assert_array_equal(found, expected)
