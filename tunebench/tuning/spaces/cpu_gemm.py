"""Matrix products of several rows on a CPU: prefill.

The kernel is `dequantize`, `x_float`, `matmul`, then element-wise blocks. A thread takes a tile of columns and
walks K: it dequantizes a part of the tile, K by columns, into a buffer that stays in its cache, and multiplies
all rows with it, a block of rows and a few vectors of columns in registers at a time. Each weight is
dequantized once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, extents, inline_epilogue, sample, split_init, vector

if TYPE_CHECKING:
    from tvm import s_tir

HEAD = ("x_float", "dequantize", "matmul")
STEP = 8  # weights of one word of 4 bits, which share what is loaded


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return kernel.blocks[:3] == HEAD and extents(sch, "matmul")[0] > 1


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    last = inline_epilogue(sch, kernel, "matmul")
    m, n, k = extents(sch, "matmul")
    lanes = vector(n, kernel.lanes)
    vectors = sample(sch, dividing(n // lanes, [1, 2, 3, 4]))
    rows = sample(sch, dividing(m, [2, 4, 6, 8, 12]))
    depth = sample(sch, dividing(k, [32, 64, 128, 256]))
    unrolled = sample(sch, [1, 2, 4])
    matmul, dequantize = sch.get_sblock("matmul"), sch.get_sblock("dequantize")
    sch.transform_layout(dequantize, ("write", 0), lambda column, deep: (deep, column))
    row, column, reduced = sch.get_loops(matmul)
    tile, columns, lane = sch.split(column, [None, vectors, lanes])
    block, inner_row = sch.split(row, [None, rows])
    outer_step, step = sch.split(reduced, [None, depth])
    inner_step, unrolled_step = sch.split(step, [None, unrolled])
    sch.reorder(tile, outer_step, block, inner_step, unrolled_step, inner_row, columns, lane)
    sch.vectorize(lane)
    for loop in (unrolled_step, inner_row, columns):
        sch.unroll(loop)
    sch.compute_at(dequantize, outer_step, preserve_unit_loops=True)
    _dequantize_in_vectors(sch, lanes)
    if last != "matmul":
        final = sch.get_sblock(last)
        sch.reverse_compute_at(final, tile, preserve_unit_loops=True)
        sch.vectorize(sch.split(sch.get_loops(final)[-1], [None, lanes])[1])
    sch.parallel(tile)
    _cast_activations(sch, kernel.lanes)
    split_init(sch, matmul, outer_step)
    return [sch]


def _dequantize_in_vectors(sch: s_tir.Schedule, lanes: int) -> None:
    """Vectors of columns, and the weights of one word together, so that the word is loaded once."""
    *_, column, deep = sch.get_loops(sch.get_sblock("dequantize"))
    outer, lane = sch.split(column, [None, lanes])
    word, place = sch.split(deep, [None, STEP])
    sch.reorder(outer, word, place, lane)
    sch.unroll(place)
    sch.vectorize(lane)


def _cast_activations(sch: s_tir.Schedule, lanes: int) -> None:
    block = sch.get_sblock("x_float")
    row, deep = sch.get_loops(block)
    _, lane = sch.split(deep, [None, vector(int(sch.get(deep).extent), lanes)])
    sch.vectorize(lane)
    sch.parallel(row)


SPACES = (
    Space(
        name="cpu-gemm",
        summary="matrix product: register block, columns a thread, depth of the dequantized part, unrolling",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
