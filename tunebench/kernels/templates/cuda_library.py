"""Products of a vendor's library, its weights dequantized a block of outputs at a time."""

from __future__ import annotations

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tunebench.kernels.templates import (
    Choices,
    Decisions,
    Gpu,
    Operation,
    Template,
    arguments,
    launch,
    product_params,
    serves,
)
from tunebench.runtime import cublas

FEWEST_ROWS = 64  # below, dequantized weights would be read too seldom to pay
BLOCK_BYTES = 48 << 20  # of dequantized weights at a time, at most
THREADS = 256


def _choices(op: Operation, gpu: Gpu) -> Choices:
    if not serves(op, gpu) or not cublas.available() or (op["residual"] and op["out"] != "float16"):
        return {}
    if op["bits"] == 16:
        return {"blocks": [1]}
    fitting = [b for b in (1, 2, 4, 8, 16) if op["n"] % (8 * b) == 0 and op["n"] // b * op["k"] * 2 <= BLOCK_BYTES]
    return {"blocks": fitting[:3]} if op["m"] >= FEWEST_ROWS and fitting else {}


def _build(op: Operation, decisions: Decisions) -> PrimFunc:
    m, n, k, bits, group = op["m"], op["n"], op["k"], op["bits"], op["group"]
    rows = n // decisions["blocks"]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        buffers = arguments(product_params(op))
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            weights = buffers["w"] if bits == 16 else T.sblock_alloc_buffer((rows, k), "float16")
            for first in range(0, n, rows):
                if bits < 16:
                    function = f"tb::dequantize<{bits}, {group}, {k}, {first}, {rows}, {THREADS}>"
                    given = (buffers["w"].data, buffers["scale"].data, weights.data)
                    launch([-(-rows * k * bits // 32 // THREADS)], THREADS, function, given)
                residual = buffers["residual" if op["residual"] else "x"]
                pointers = (buffers["x"].data, weights.data, residual.data, buffers["y"].data)
                sizes = (m, rows, k, n, first, int(op["out"] == "float16"), op["residual"])
                T.evaluate(T.call_packed(cublas.NAME, *pointers, *sizes))
    return builder.get()


TEMPLATES = (
    Template("cublas", "matmul", "cuBLAS, on weights dequantized in blocks", _choices, _build, source="library"),
)
