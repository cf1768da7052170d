"""What a kernel says that it computes, and that no template gets a weight format that it does not read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import ASYMMETRIC
from template_cases import FORMATS
from test_cuda import plain_kernel
from tvm import s_tir

from tunebench.compile import passes
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import int8_dot, templates
from tunebench.kernels.operation import Append, Attention, LastRow, Matmul, Operation, RmsNorm, SiluMul, parse
from tunebench.kernels.templates import FLOAT16, INT4, INT8, Gpu
from tunebench.model import quantization
from tunebench.spec import WeightFormat
from tunebench.tuning import spaces

MATMUL = Matmul(m=1, n=512, k=512, out="float16", residual=True, dtype="float16", weight=INT4)
HEADS: dict[str, Any] = {"heads": 8, "kv_heads": 2, "dim": 64, "context": 128, "dtype": "float16"}
KNOWN = {
    '{"op": "matmul", "m": 1, "n": 512, "k": 512, "out": "float16", "residual": 1, "dtype": "float16", '
    '"bits": 4, "group": 32, "layout": "NK"}': MATMUL,
    '{"op": "matmul", "m": 16, "n": 512, "k": 512, "out": "float32", "residual": 0, "dtype": "float32", '
    '"bits": 32, "group": 0, "layout": "NK"}': Matmul(
        16, 512, 512, "float32", False, "float32", quantization.schemes()["q0f32"].weight
    ),
    '{"op": "attention", "b": 1, "m": 2, "heads": 8, "kv_heads": 2, "dim": 64, "context": 128, "dtype": "float16"}': (
        Attention(b=1, m=2, **HEADS)
    ),
    '{"op": "append", "b": 1, "m": 2, "heads": 8, "kv_heads": 2, "dim": 64, "context": 128, "dtype": "float16"}': (
        Append(b=1, m=2, **HEADS)
    ),
    '{"op": "rms_norm", "rows": 3, "width": 64, "epsilon": 1e-05, "dtype": "float16"}': (
        RmsNorm(3, 64, 1e-5, "float16")
    ),
    '{"op": "silu_mul", "rows": 3, "width": 64, "dtype": "float16"}': SiluMul(3, 64, "float16"),
    '{"op": "last_row", "b": 1, "m": 16, "width": 64, "dtype": "float16"}': LastRow(1, 16, 64, "float16"),
}
UNREAD = {
    "scales in float32": replace(INT4, dtype="float32"),
    "groups of 16": replace(INT4, group=16),
    "groups of 256": replace(INT4, group=256),
    "groups of groups": replace(INT4, group=32, super_group=256),
    "inputs in an order of their own": replace(INT4, ordered=True),
    "columns": replace(INT4, layout="KN"),
    "tiles": replace(INT4, layout="N16", packing="by_byte"),
    "another order": replace(INT4, packing="by_byte"),
    "two bits": replace(INT4, bits=2),
    "small floats": WeightFormat("float", 4, "float16", 32),
    "bfloat16": replace(FLOAT16, dtype="bfloat16"),
}
"""Formats beside those that templates read."""
EVERYTHING = frozenset({"ptx", "pairs", "lanes32", "half", "matrix16"})
GPUS = [Gpu("cuda", 80), Gpu("cuda", 90)] + [Gpu(kind, 0, 256, 32 << 10, EVERYTHING) for kind in ("webgpu", "opencl")]


@pytest.mark.parametrize("text", KNOWN)
def test_the_text_that_databases_hold(text: str) -> None:
    assert parse(text) == KNOWN[text]
    assert KNOWN[text].text() == text


@pytest.mark.parametrize("weight", [*UNREAD.values(), *(each for each in FORMATS.values() if each not in (INT4, INT8))])
def test_the_text_tells_other_formats_apart(weight: WeightFormat) -> None:
    operation = replace(MATMUL, weight=weight)
    assert parse(operation.text()) == operation
    assert operation.text() != MATMUL.text()


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: f"{gpu.kind}{gpu.arch or ''}")
@pytest.mark.parametrize("name", UNREAD)
def test_no_template_gets_a_format_that_it_does_not_read(name: str, gpu: Gpu) -> None:
    served = {t.name for m in (1, 16, 128) for t in templates.serving(replace(MATMUL, m=m), gpu)}
    assert len(served) >= 2
    for m in (1, 4, 16, 128):
        assert not templates.serving(replace(MATMUL, m=m, weight=UNREAD[name]), gpu)


def test_each_template_reads_all_weights_of_its_bits() -> None:
    found = {name: t for name, t in templates.templates().items() if t.operation is Matmul}
    assert len(found) >= 8
    for name, template in found.items():
        assert template.weights, name
        for weight in (FLOAT16, INT4, INT8, *FORMATS.values()):
            assert template.covers(replace(MATMUL, weight=weight)) == (weight.bits in template.weights), name


@pytest.mark.parametrize("name", ["groups of 16", "groups of 256"])
@pytest.mark.parametrize("m", [1, 16])
def test_no_space_is_for_what_no_template_reads(name: str, m: int) -> None:
    def matching(weight: WeightFormat) -> list[str]:
        operation = replace(MATMUL, m=m, weight=weight)
        sch = s_tir.Schedule(passes.task_module(plain_kernel(operation)))
        kernel = spaces.Kernel(tuple(passes.block_names(sch)), 4, 0, operation=operation, gpu=GPUS[1])
        return [name for name, each in spaces.spaces().items() if each.device == "gpu" and each.matches(sch, kernel)]

    assert matching(INT4) == ["gpu-template"]
    assert matching(UNREAD[name]) == []


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", ["symmetric", *ASYMMETRIC])
@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_a_plain_product_computes_with_the_weights_that_are_stored(zero: Any, bits: int, layout: Any) -> None:
    weight = WeightFormat("integer", bits, "float16", 32, zero, layout)
    operation = Matmul(m=3, n=48, k=64, out="float32", residual=False, dtype="float16", weight=weight)
    func = plain_kernel(operation)
    assert gpu_kernels.operation(func) == operation
    rng = np.random.default_rng(0)
    kind = quantization.kind_of(weight)
    parts = kind.quantize(weight, rng.uniform(-1, 3, (48, 64)).astype(np.float32))
    x, y = rng.standard_normal((3, 64)).astype(np.float16), np.zeros((3, 48), np.float32)
    held = [tvm.runtime.tensor(array) for array in (x, *parts.values(), y)]
    tvm.compile(passes.task_module(func), target="llvm")["main"](*held)
    wanted = x.astype(np.float32) @ kind.dequantize(weight, parts).T
    np.testing.assert_allclose(held[-1].numpy(), wanted, atol=5e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("weight", [*(UNREAD[name] for name in sorted({*UNREAD} - {"tiles"})), INT4, INT8])
def test_products_of_bytes_are_for_tiles_alone(weight: WeightFormat) -> None:
    assert callable(int8_dot.product(UNREAD["tiles"], "float32"))
    with pytest.raises(ValueError, match="integers in tiles"):
        int8_dot.product(weight, "float32")


def test_a_kernel_of_others_says_nothing() -> None:
    func = plain_kernel(RmsNorm(2, 32, 1e-5, "float16"))
    assert isinstance(gpu_kernels.operation(func), Operation)
    assert gpu_kernels.operation(func.without_attr(gpu_kernels.OP)) is None
