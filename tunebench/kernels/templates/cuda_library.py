"""Products of a vendor's library, its weights dequantized a block of outputs at a time."""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Matmul
from tunebench.kernels.templates import (
    FLOAT16,
    INT4,
    INT8,
    Choices,
    Decisions,
    Gpu,
    Template,
    arguments,
    has_tensor_cores,
    launch,
    product_params,
)
from tunebench.runtime import cublas

FEWEST_ROWS = 64  # below, dequantized weights would be read too seldom to pay
BLOCK_BYTES = 48 << 20  # of dequantized weights at a time, at most
THREADS = 256


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    if not has_tensor_cores(op, gpu) or not cublas.available() or (op.residual and op.out != "float16"):
        return {}
    if op.weight == FLOAT16:
        return {"blocks": [1]}
    fitting = [b for b in (1, 2, 4, 8, 16) if op.n % (8 * b) == 0 and op.n // b * op.k * 2 <= BLOCK_BYTES]
    return {"blocks": fitting[:3]} if op.m >= FEWEST_ROWS and fitting else {}


def _build(op: Matmul, decisions: Decisions) -> PrimFunc:
    m, n, k, weight = op.m, op.n, op.k, op.weight
    rows = n // decisions["blocks"]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        buffers = arguments(product_params(op))
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            weights = buffers["w"] if weight == FLOAT16 else T.sblock_alloc_buffer((rows, k), "float16")
            for first in range(0, n, rows):
                if weight != FLOAT16:
                    function = f"tb::dequantize<{weight.bits}, {weight.group}, {k}, {first}, {rows}, {THREADS}>"
                    given = (buffers["w"].data, buffers["scale"].data, weights.data)
                    launch([-(-rows * k // weight.per_word // THREADS)], THREADS, function, given)
                residual = buffers["residual" if op.residual else "x"]
                pointers = (buffers["x"].data, weights.data, residual.data, buffers["y"].data)
                sizes = (m, rows, k, n, first, int(op.out == "float16"), int(op.residual))
                T.evaluate(T.call_packed(cublas.NAME, *pointers, *sizes))
    return builder.get()


TEMPLATES = (
    Template(
        "cublas",
        Matmul,
        "cuBLAS, on weights dequantized in blocks",
        _choices,
        _build,
        weights=(FLOAT16, INT4, INT8),
        source="library",
    ),
)
