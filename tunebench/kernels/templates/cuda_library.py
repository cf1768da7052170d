"""Products of a vendor's library, its weights dequantized a block of outputs at a time."""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, Expr, PrimFunc

from tunebench.dtypes import DTYPES
from tunebench.kernels.operation import Matmul
from tunebench.kernels.templates import (
    PLAIN,
    ZEROS,
    Choices,
    Decisions,
    Gpu,
    Template,
    arguments,
    has_tensor_cores,
    launch,
    product_params,
    zero_of,
)
from tunebench.runtime import cublas

FEWEST_ROWS = 64  # below, dequantized weights would be read too seldom to pay
BLOCK_BYTES = 48 << 20  # of dequantized weights at a time, at most
THREADS = 256


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    if not has_tensor_cores(op, gpu) or not cublas.available() or _unadded(op):
        return {}
    if not op.weight.group:
        return {"blocks": [1]}
    fitting = [b for b in (1, 2, 4, 8, 16) if op.n % (8 * b) == 0 and op.n // b * op.k * 2 <= BLOCK_BYTES]
    return {"blocks": fitting[:3]} if op.m >= FEWEST_ROWS and fitting else {}


def _unadded(op: Matmul) -> bool:
    """Whether there is a residual that the library cannot add."""
    return op.residual and not op.bias and op.out != "float16"


def _build(op: Matmul, decisions: Decisions) -> PrimFunc:
    m, n, k, weight = op.m, op.n, op.k, op.weight
    rows = n // decisions["blocks"]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        buffers = arguments(product_params(op))
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            weights = T.sblock_alloc_buffer((rows, k), "float16") if weight.group else buffers["w"]
            residual = buffers["residual" if op.residual else "x"]
            if op.bias:
                function = f"tb::spread<{m}, {n}, {THREADS}, {str(op.residual).lower()}, {DTYPES[op.out].cuda}>"
                given = [buffers["bias"].data, residual.data, buffers["y"].data]
                launch([-(-m * n // THREADS)], THREADS, function, given)
            for first in range(0, n, rows):
                if weight.group:
                    call = _dequantize(op, first, rows, buffers, weights)
                    launch([-(-rows * k // weight.per_word // THREADS)], THREADS, *call)
                pointers = (buffers["x"].data, weights.data, residual.data, buffers["y"].data)
                add = cublas.TO_Y if op.bias else int(op.residual)
                sizes = (m, rows, k, n, first, int(op.out == "float16"), add)
                T.evaluate(T.call_packed(cublas.NAME, *pointers, *sizes))
    return builder.get()


def _dequantize(op: Matmul, first: int, rows: int, buffers: dict[str, Buffer], to: Buffer) -> tuple[str, list[Expr]]:
    """The call that makes halves of some outputs' weights, and its arguments."""
    weight = op.weight
    numbers, names = [weight.bits, weight.group, op.k, first, rows, THREADS], ["w", "scale"]
    call, more = f"tb::dequantize<{', '.join(map(str, numbers))}>", []
    if weight not in PLAIN:
        call = f"{call[:-1]}, {zero_of(weight)}>"
        more = ["offset" if weight.zero in ZEROS else "scale"]
    return call, [*(buffers[name].data for name in names), to.data, *(buffers[name].data for name in more)]


TEMPLATES = (
    Template(
        "cublas",
        Matmul,
        "cuBLAS, on weights dequantized in blocks",
        _choices,
        _build,
        weights=(16, 4, 8),
        takes=("bias",),
        source="library",
    ),
)
