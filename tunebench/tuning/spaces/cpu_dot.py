"""Products with int8 activations on a CPU, one row or many.

The kernel is `int8_dot.product`: `unpack`, `dot`, `matmul`, `out`, then element-wise blocks. A thread takes tiles of
16 outputs and walks the groups: a block of rows and a few tiles at a time, it unpacks the group's words once and
keeps the sums of all of them in registers. Where the target has an instruction for bytes, it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, extents, inline_epilogue, sample

if TYPE_CHECKING:
    from tvm import s_tir
    from tvm.s_tir.schedule import LoopRV, SBlockRV

HEAD = ("unpack", "dot", "matmul")
LANES = 16  # outputs of a tile
TILES = {1: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12), 2: (1, 2, 3, 4, 6), 4: (1, 2, 3)}
"""Tiles side by side -> rows at a time. More sums than 15 vectors would leave the stack."""


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return kernel.blocks[:3] == HEAD


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    last = inline_epilogue(sch, kernel, "matmul")
    m, tiles, _, _ = extents(sch, "matmul")
    designs = []
    for side, blocks in TILES.items():
        if tiles % side == 0:
            rows = dividing(m, blocks)
            designs.append(_design(sch.copy(), kernel, last, side, rows, by_row=False))
            if side * max(rows) > 1:
                designs.append(_design(sch.copy(), kernel, last, side, rows, by_row=True))
            pairs = [number for number in rows if number % 2 == 0]
            if kernel.matrix_dot and pairs:
                designs.append(_design(sch.copy(), kernel, last, side, pairs, by_row=False, by_pair=True))
    return designs


def _design(
    sch: s_tir.Schedule, kernel: Kernel, last: str, side: int, blocks: list[int], by_row: bool, by_pair: bool = False
) -> s_tir.Schedule:
    """`by_row`: a row's sum over a group is finished before the next one's; otherwise all rows take each word.

    `by_pair`: two rows take eight places at a time, as matrices.
    """
    unpack, dot, matmul, out = (sch.get_sblock(name) for name in (*HEAD, last))
    halves = extents(sch, "unpack")[-2]
    if by_pair:  # what one instruction takes lies side by side
        sch.transform_layout(dot, ("write", 0), lambda row, tile, group, lane: (tile, group, row, lane))
        sch.transform_layout(
            unpack, ("write", 0), lambda t, group, word, half, lane: (t, group, word * halves + half, lane)
        )
    rows = sample(sch, blocks)
    unrolled = sample(sch, dividing(extents(sch, "matmul")[3], [1, 2, 4]))
    row, tile, lane, group = sch.get_loops(matmul)
    outer_row, inner_row = sch.split(row, [None, rows])
    outer_tile, inner_tile = sch.split(tile, [None, side])
    step, inner_group = sch.split(group, [None, unrolled])
    sch.reorder(outer_tile, outer_row, step, inner_group, inner_tile, inner_row, lane)
    sch.vectorize(lane)
    for loop in (inner_group, inner_tile, inner_row):
        sch.unroll(loop)
    sch.compute_at(dot, inner_row if by_row else inner_group, preserve_unit_loops=True)
    word, lanes = _order_pairs(sch, dot) if by_pair else _order(sch, dot)
    intrinsic = kernel.matrix_dot if by_pair else kernel.dots.get(8 // halves, "")
    if not intrinsic:
        byte = sch.get_loops(dot)[-1]
        sch.reorder(byte, lanes)
        sch.unroll(byte)
        sch.vectorize(lanes)
    sch.compute_at(unpack, inner_group, preserve_unit_loops=True)
    _in_registers(sch, unpack, 5)
    sch.reverse_compute_at(out, outer_row, preserve_unit_loops=True)
    columns = sch.get_loops(out)[-1]
    sch.unroll(sch.get_loops(out)[-2])
    vectors, lane = sch.split(columns, [None, LANES])
    sch.unroll(vectors)
    sch.vectorize(lane)
    sch.parallel(outer_tile)
    _in_registers(sch, sch.decompose_reduction(matmul, step), 3)
    _in_registers(sch, sch.decompose_reduction(dot, word), 5 if by_pair else 4)
    if intrinsic:
        sch.tensorize(lanes, intrinsic)
    return sch


def _order(sch: s_tir.Schedule, dot: SBlockRV) -> tuple[LoopRV, LoopRV]:
    """Words outside, then the sums that take each of them; the loops over words and over lanes."""
    row, tile, group, lane, word, half, byte = sch.get_loops(dot)[-7:]
    sch.reorder(word, half, tile, row, group, lane, byte)
    for loop in (word, half, tile, row, group):
        sch.unroll(loop)
    return word, lane


def _order_pairs(sch: s_tir.Schedule, dot: SBlockRV) -> tuple[LoopRV, LoopRV]:
    """As `_order`, with two rows and two parts of four places inside; the loops over words and over the two rows."""
    row, tile, group, lane, word, half, byte = sch.get_loops(dot)[-7:]
    row, pair = sch.split(row, [None, 2])
    if int(sch.get(half).extent) == 1:
        word, part = sch.split(word, [None, 2])
        inner = [word, half, tile, row, group]
    else:
        part, inner = half, [word, tile, row, group]
    sch.reorder(*inner, pair, lane, part, byte)
    for loop in inner:
        sch.unroll(loop)
    return word, pair


def _in_registers(sch: s_tir.Schedule, block: SBlockRV, depth: int) -> None:
    """Vectors of the innermost loop, and the `depth` - 1 around it unrolled, so that each has a place of its own."""
    *outer, lane = sch.get_loops(block)[-depth:]
    sch.vectorize(lane)
    for loop in outer:
        sch.unroll(loop)


SPACES = (
    Space(
        name="cpu-dot",
        summary="products with int8 activations: rows and tiles in registers, their order, unrolling",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
