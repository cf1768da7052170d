"""What the passes leave: kernels only, no dequantized matrix in memory, a cache updated in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from conftest import CHUNKS, cpu_target, draw_designs, draw_records, load_model, lower, write_config
from tvm import relax, s_tir

from tunebench.compile import passes, tasks
from tunebench.compile.build import compile_model
from tunebench.compile.tasks import Task, replay
from tunebench.engines.tvm import TvmEngine, load
from tunebench.model import workload as workloads
from tunebench.model.workload import Model, function_name

SCHEMES = ("q0f32", "q4f16_0", "q4f16_1", "q8f16_1", "q4i8f16_0")
QUANTIZED = ("q4f16_0", "q4f16_1", "q4f32_1", "q8f16_1", "q4i8f16_0", "q8i8f16_0")
ALLOCATING = [
    s_tir.transform.LowerInitBlock(),
    s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
    s_tir.transform.ConvertBlocksToOpaque(),
    s_tir.transform.CompactBufferAllocation(),
]


def allocated(mod: tvm.IRModule) -> list[tuple[str, int]]:
    """Dtype and number of elements of every buffer that a scheduled kernel allocates."""
    found: list[tuple[str, int]] = []

    def visit(block: s_tir.SBlock) -> None:
        found.extend((str(b.dtype), int(np.prod([int(e) for e in b.shape]))) for b in block.alloc_buffers)

    body = tvm.ir.transform.Sequential(ALLOCATING)(mod)["main"].body
    tvm_ffi.structural_walk(body, [(s_tir.SBlock, visit)])
    return found


def matrix_elements(task: Task) -> int:
    """Weights of the quantized matrix that a kernel reads; 0 where there is none."""
    words = [p for p in task.mod["main"].params if str(p.dtype) == "uint32"]
    per_word = 4 if "q8" in task.name else 8
    return sum(int(np.prod([int(e) for e in word.shape])) * per_word for word in words)


def materialised(task: Task, mod: tvm.IRModule) -> list[tuple[str, int]]:
    """Buffers as large as half the kernel's weight matrix, in a float type or with the weights of a word apart."""
    half, apart = matrix_elements(task) // 2, matrix_elements(task) // 4
    return [
        (dtype, size)
        for dtype, size in allocated(mod)
        if half and ((size >= half and "float" in dtype) or (size >= apart and dtype == "uint32"))
    ]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_operator_becomes_a_kernel(name: str, target: tvm.target.Target, config: Path) -> None:
    mod, _ = lower(load_model(config, name), target)
    allowed = {"relax.call_tir", "relax.call_tir_inplace", "relax.reshape"}
    used: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call):
            used.add(expr.op.name if isinstance(expr.op, tvm.ir.Op) else str(expr.op))

    for chunk in (1, *CHUNKS):
        relax.analysis.post_order_visit(mod[function_name(chunk)], visit)
    assert {"relax.call_tir", "relax.call_tir_inplace"} <= used <= allowed


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_kernel_holds_a_dequantized_matrix(name: str, target: tvm.target.Target, tmp_path: Path) -> None:
    found = wide_tasks(name, target, tmp_path)
    assert len(found) >= 9
    for task in found:
        assert not materialised(task, passes.default_schedule(task.mod, cpu_target())), task.name


@pytest.mark.parametrize("name", ["q4f16_0", "q4f16_1", "q4i8f16_0"])
def test_no_tuned_kernel_holds_a_dequantized_matrix(name: str, target: tvm.target.Target, tmp_path: Path) -> None:
    found = wide_tasks(name, target, tmp_path)
    for task in found:
        for seed in range(2):
            for schedule in draw_designs(task, target, seed):
                assert not materialised(task, schedule.mod), task.name


def wide_tasks(name: str, target: tvm.target.Target, folder: Path) -> list[Task]:
    """Kernels over a matrix that is several times the largest tile."""
    path = write_config(folder, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, head_dim=128)
    _, found = lower(load_model(path, name), target)
    return [task for task in found if matrix_elements(task) >= 512 * 512 and "take" not in task.name]


@pytest.mark.parametrize("name", ["q4f16_0", "q4f16_1"])
def test_a_dequantized_matrix_would_be_found(name: str, target: tvm.target.Target, tmp_path: Path) -> None:
    found = [task for task in wide_tasks(name, target, tmp_path) if 1 not in task.calls]
    assert found
    for task in found:
        assert materialised(task, task.mod), task.name  # the kernel as it is before it gets any schedule


@pytest.mark.parametrize("schedule", ["default", "tuned"])
def test_the_cache_is_updated_in_place(schedule: str, target: tvm.target.Target, config: Path) -> None:
    model = load_model(config, "q4f16_1")
    mod, found = lower(model, target)
    records = draw_records(found, target, 0) if schedule == "tuned" else {}
    loaded = load(model, workloads.random_weights(model, 0), tvm.cpu())
    machine = relax.VirtualMachine(compile_model(mod, target, records).executable, tvm.cpu())
    before = [tensor.numpy() for tensor in (*loaded.keys, *loaded.values)]
    tokens, one = (tvm.runtime.tensor(np.full(shape, 5, np.int32)) for shape in ((1, 1), (1,)))
    result = machine["decode"](tokens, one, one, loaded.rope_cos_sin, loaded.keys, loaded.values, loaded.params)
    pairs = list(zip((*loaded.keys, *loaded.values), (*result[1], *result[2]), strict=True))
    assert len(pairs) == 2 * model.config.num_hidden_layers
    for old, (given, returned) in zip(before, pairs, strict=True):
        assert pointer(given) == pointer(returned)
        changed = given.numpy() != old
        assert changed.any()
        assert changed.sum() <= model.config.num_key_value_heads * model.config.head_dim


def pointer(tensor: tvm.runtime.Tensor) -> int:
    """Where a tensor's data lies."""
    return int(np.from_dlpack(tensor).ctypes.data)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_call_is_counted_once(name: str, target: tvm.target.Target, config: Path) -> None:
    model = load_model(config, name)
    mod, found = lower(model, target)
    for chunk in (1, *CHUNKS):
        calls = str(mod[function_name(chunk)]).count("R.call_tir")
        assert calls == sum(task.calls.get(chunk, 0) for task in found)
    assert len({task.key for task in found}) == len(found)


def test_shares_add_up(target: tvm.target.Target, config: Path) -> None:
    _, found = lower(load_model(config, "q4f16_1"), target)
    times = {task.key: float(i + 1) for i, task in enumerate(found)}
    for chunk in (1, *CHUNKS):
        share = tasks.shares(found, chunk, lambda task: times[task.key])
        assert sum(share.values()) == pytest.approx(1)
        assert set(share) == {task.key for task in found if chunk in task.calls}
    nothing = tasks.shares(found, 1, lambda task: 0.0)
    assert set(nothing.values()) == {0.0}


def test_equal_kernels_of_several_layers_are_one_task(target: tvm.target.Target, tmp_path: Path) -> None:
    counts = {}
    for layers in (1, 3):
        model = load_model(write_config(tmp_path, num_hidden_layers=layers), "q4f16_1")
        counts[layers] = {task.name: dict(task.calls) for task in lower(model, target)[1]}
    assert counts[1].keys() == counts[3].keys()
    assert counts[3]["attention"][1] == 3 * counts[1]["attention"][1] == 3


def test_a_record_replays_to_the_same_program(target: tvm.target.Target, config: Path) -> None:
    _, found = lower(load_model(config, "q4f16_1"), target)
    records = draw_records(found, target, 5)
    for task in found:
        again = replay(task.mod, records[task.key])
        assert tvm_ffi.structural_equal(again, replay(task.mod, records[task.key]))
        assert not tvm_ffi.structural_equal(again, task.mod), task.name


def test_an_engine_returns_its_own_logits(target: tvm.target.Target, config: Path) -> None:
    model: Model = load_model(config, "q4f16_1")
    mod, _ = lower(model, target)
    loaded = load(model, workloads.random_weights(model, 0), tvm.cpu())
    engine = TvmEngine(model, compile_model(mod, target, {}).executable, loaded, tvm.cpu())
    with pytest.raises(ValueError, match="nothing"):
        engine.logits()
    engine.decode(np.array([[3]], np.int32), 0)
    first = engine.logits()
    engine.decode(np.array([[4]], np.int32), 1)
    assert first.shape == (1, 128)
    assert np.abs(first - engine.logits()).max() > 0
