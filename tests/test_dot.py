"""Products of bytes: every instruction that this CPU has, and none, on the values that could overflow."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from conftest import THREADS
from tvm import s_tir, te
from tvm.target import codegen

from tunebench import environment
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import int8_dot
from tunebench.kernels.operation import SiluMul
from tunebench.model.quantization import kind_of, schemes
from tunebench.tuning.spaces import Kernel, cpu_dot

GROUP, TILES, GROUPS = 32, 3, 2
N, K = 16 * TILES, GROUP * GROUPS
NEEDS = {"cascadelake": {"avx512_vnni"}, "alderlake": {"avx_vnni"}, "x86-64-v3": {"avx2"}, "x86-64-v2": set()}


def cpu(name: str) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": name, "num-cores": THREADS})


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("cascadelake", 4, "tunebench.dot.avx512vnni"),
        ("cascadelake", 8, "tunebench.dot.avx512vnni"),
        ("alderlake", 4, "tunebench.dot.avxvnni"),
        ("x86-64-v3", 4, "tunebench.dot.avx2"),
        ("x86-64-v3", 8, "tunebench.dot.avx2.wide"),
        ("x86-64-v2", 4, ""),
    ],
)
def test_a_target_gets_the_best_instruction_it_has(name: str, bits: int, expected: str) -> None:
    assert int8_dot.instruction(cpu(name), bits) == expected


def product(rows: int, bits: int) -> tvm.tirx.PrimFunc:
    per_word = 32 // bits
    x = te.placeholder((rows, K), "int8", name="x")
    x_scale = te.placeholder((rows, GROUPS), "float32", name="x_scale")
    offset = te.placeholder((rows, GROUPS), "int32", name="offset")
    words = te.placeholder((TILES, K // per_word, 16), "uint32", name="words")
    scale = te.placeholder((TILES, GROUPS, 16), "float16", name="scale")
    y = int8_dot.product(schemes()[f"q{bits}i8f16_0"].weight, "float32")(x, x_scale, offset, words, scale)
    return te.create_prim_func([x, x_scale, offset, words, scale, y]).with_attr("tirx.noalias", True)


def inputs(rows: int, bits: int, extreme: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Arguments, and the product in whole numbers."""
    rng = np.random.default_rng(bits)
    weight = schemes()[f"q{bits}i8f16_0"].weight
    words = rng.integers(0, 2**32, kind_of(weight).shapes(weight, N, K)["q_weight"][0], np.uint32)
    x = rng.integers(-127, 128, (rows, K), np.int8)
    if extreme:
        words[...] = 0xFFFFFFFF
        x = np.where(x < 0, -127, 127).astype(np.int8)
        x[0] = 127
    parts = {"q_weight": words, "q_scale": np.ones((TILES, GROUPS, 16), np.float16)}
    weights = kind_of(weight).dequantize(weight, parts)
    zero = 2 ** (bits - 1) - 1
    offset = -zero * x.astype(np.int32).reshape(rows, GROUPS, GROUP).sum(-1)
    return [x, np.ones((rows, GROUPS), np.float32), offset.astype(np.int32), *parts.values()], x @ weights.T


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", NEEDS)
def test_every_instruction_is_exact(name: str, bits: int, extreme: bool) -> None:
    if not NEEDS[name] <= environment.isa():
        pytest.skip(f"this CPU cannot run {name}")
    rows = 4
    sch = s_tir.Schedule(product(rows, bits))
    target = cpu(name)
    kernel = Kernel(
        ("unpack", "dot", "matmul", "out"), 8, THREADS, {b: int8_dot.instruction(target, b) for b in (4, 8)}
    )
    arguments, expected = inputs(rows, bits, extreme)
    for design in cpu_dot.SPACES[0].generate(sch, kernel):
        out = tvm.runtime.tensor(np.zeros((rows, N), np.float32))
        tvm.compile(design.mod, target=target)["main"](*map(tvm.runtime.tensor, arguments), out)
        np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize(
    ("triple", "name", "bits", "mnemonic"),
    [
        ("x86_64-linux-gnu", "cascadelake", 4, "vpdpbusd"),
        ("x86_64-linux-gnu", "x86-64-v3", 4, "vpmaddubsw"),
        ("x86_64-linux-gnu", "x86-64-v3", 8, "vpmaddwd"),
        ("aarch64-linux-gnu", "neoverse-n1", 4, "sdot"),
        ("aarch64-linux-gnu", "neoverse-n1", 8, "sdot"),
        ("aarch64-linux-gnu", "neoverse-v1", 8, "usdot"),
    ],
)
def test_the_instruction_reaches_the_machine_code(triple: str, name: str, bits: int, mnemonic: str) -> None:
    target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mcpu": name, "num-cores": THREADS})
    kernel = Kernel(("unpack", "dot", "matmul", "out"), 4, THREADS, {bits: int8_dot.instruction(target, bits)})
    design = cpu_dot.SPACES[0].generate(s_tir.Schedule(product(1, bits)), kernel)[0]
    assert mnemonic in tvm.compile(design.mod, target=target).mod.inspect_source("asm")


def run(func: tvm.tirx.PrimFunc, *arrays: np.ndarray) -> list[np.ndarray]:
    """Call a kernel on this machine; every buffer afterwards."""
    held = [tvm.runtime.tensor(array) for array in arrays]
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    tvm.compile(mod, target=cpu(codegen.llvm_get_system_cpu()))["main"](*held)
    return [tensor.numpy() for tensor in held]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_are_quantized_to_the_nearest_step(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 96)) * 10.0 ** rng.integers(-3, 3, (3, 1))).astype(dtype)
    x[1, 32:64] = 0
    shape = 3, 3
    empty = np.zeros((3, 96), np.int8), np.zeros(shape, np.float32), np.ones(shape, np.int32)
    _, integers, scales, offsets = run(cpu_kernels.quantize_rows(3, 96, 32, 7, dtype), x, *empty)
    groups = x.astype(np.float32).reshape(3, 3, 32)
    np.testing.assert_allclose(scales, np.abs(groups).max(-1) / 127, rtol=1e-6)
    back = integers.reshape(3, 3, 32) * scales[..., None]
    assert (np.abs(back - groups) <= scales[..., None] * 0.5001).all()
    np.testing.assert_array_equal(offsets, -7 * integers.astype(np.int32).reshape(3, 3, 32).sum(-1))


def test_the_gate_is_silu_times_up() -> None:
    x = np.random.default_rng(0).uniform(-100, 100, (2, 192)).astype(np.float32)
    x[0, :4] = 0, -88, 88, 1e-3
    _, found = run(cpu_kernels.silu_mul(SiluMul(2, 96, "float32")), x, np.zeros((2, 96), np.float32))
    gate, up = x[:, :96].astype(np.float64), x[:, 96:]
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)
