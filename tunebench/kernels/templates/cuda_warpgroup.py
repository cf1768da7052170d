"""Products of many rows on Hopper's warpgroup instructions."""

from __future__ import annotations

from itertools import product

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Matmul
from tunebench.kernels.templates import (
    HOPPER,
    Choices,
    Decisions,
    Gpu,
    Template,
    arguments,
    has_tensor_cores,
    launch,
    launched_early,
    overlap,
    product_call,
    product_params,
)

STEP = 128  # along k
STAGES = (2, 3, 4)
ROWS = (64, 128)
BLOCKS = ((1, 2), (1, 4), (2, 1), (2, 2), (4, 1))  # warpgroups of a block, and blocks on a multiprocessor at once
TILE = 100  # "tile": this many times the rows of x, and the pair of BLOCKS as two digits
THREADS = 256  # of the kernel that arranges x


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    m, n, k = op.m, op.n, op.k
    if not has_tensor_cores(op, gpu) or gpu.arch != HOPPER or k % STEP or k // STEP < STAGES[-1]:
        return {}
    fitting = [(r, w, b) for r, (w, b) in product(ROWS, BLOCKS) if m % r == 0 and n % (64 * w) == 0]
    tiles = [TILE * rows + 10 * warpgroups + blocks for rows, warpgroups, blocks in fitting]
    return {"tile": tiles, "stages": STAGES, **overlap(gpu)} if tiles else {}


def _build(op: Matmul, decisions: Decisions) -> PrimFunc:
    m, n, k, stages = op.m, op.n, op.k, decisions["stages"]
    rows, (warpgroups, blocks) = decisions["tile"] // TILE, divmod(decisions["tile"] % TILE, 10)
    shared_bytes = 1024 + max(stages * rows * STEP * 2, 32 * (warpgroups * 64 + 4) * 4)
    call, names = product_call("warpgroups", [m, n, k, rows, warpgroups, stages], op, [op.weight.group])
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        buffers = arguments(product_params(op))
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            arranged = T.sblock_alloc_buffer((m * k,), "float16")
            arrange = f"tb::arrange<{m}, {k}, {rows}, {THREADS}>"
            launch([-(-m * k // 8 // THREADS)], THREADS, arrange, [buffers["x"].data, arranged.data])
            args = [arranged.data if name == "x" else buffers[name].data for name in names]
            grid, more = (m // rows, n // (64 * warpgroups)), args[5:]
            launch(grid, 128 * warpgroups, call, args[:5], shared_bytes=shared_bytes, blocks=blocks, more=more)
    return launched_early(builder.get()) if decisions["overlap"] else builder.get()


TEMPLATES = (
    Template(
        "cuda-warpgroup",
        Matmul,
        "Hopper: 64 outputs a warpgroup, weights in registers",
        _choices,
        _build,
        weights=(4,),
        takes=("bias",),
    ),
)
