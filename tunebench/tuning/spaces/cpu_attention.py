"""Attention on a CPU, of one token or many.

The kernel is `kernels.cpu_attention.attention`: rows of a tile of tokens of one head, which threads take in turn.
Both products keep a block of sums in registers: scores of a few tokens with a vector of keys, and some vectors of a
few tokens' outputs, so that what is read from the cache is converted once for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, sample

if TYPE_CHECKING:
    from tvm import s_tir

LANES = 16


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    if kernel.blocks != ("row",):
        return False
    inner = sch.get_child_blocks(sch.get_sblock("row"))
    return [str(sch.get(block).name_hint) for block in inner] == ["scores", "mix"]


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    _scores(sch)
    _mix(sch)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("row"))))
    return [sch]


def _scores(sch: s_tir.Schedule) -> None:
    block = sch.get_sblock("scores")
    row, lane, depth = sch.get_loops(block)[-3:]
    rows = sample(sch, dividing(int(sch.get(row).extent), [2, 4, 8, 16]))
    unrolled = sample(sch, dividing(int(sch.get(depth).extent), [2, 4, 8]))
    outer_row, inner_row = sch.split(row, [None, rows])
    outer_depth, inner_depth = sch.split(depth, [None, unrolled])
    sch.reorder(outer_row, outer_depth, inner_depth, inner_row, lane)
    sch.vectorize(lane)
    for loop in (inner_row, inner_depth):
        sch.unroll(loop)
    *_, init_row, init_lane = sch.get_loops(sch.decompose_reduction(block, outer_depth))
    sch.unroll(init_row)
    sch.vectorize(init_lane)


def _mix(sch: s_tir.Schedule) -> None:
    block = sch.get_sblock("mix")
    key, lane, row, depth = sch.get_loops(block)[-4:]
    extent = int(sch.get(depth).extent)
    vector = max(dividing(extent, [2, 4, 8, LANES]))
    rows = sample(sch, dividing(int(sch.get(row).extent), [2, 4, 8]))
    vectors = sample(sch, dividing(extent // vector, [2, 4, 8]))
    outer_row, inner_row = sch.split(row, [None, rows])
    outer_depth, inner_depth, inner_lane = sch.split(depth, [None, vectors, vector])
    sch.reorder(outer_row, outer_depth, key, lane, inner_row, inner_depth, inner_lane)
    sch.vectorize(inner_lane)
    for loop in (inner_row, inner_depth):
        sch.unroll(loop)
    *_, init_row, init_depth, init_lane = sch.get_loops(sch.decompose_reduction(block, key))
    for loop in (init_row, init_depth):
        sch.unroll(loop)
    sch.vectorize(init_lane)


SPACES = (
    Space(
        name="cpu-attention",
        summary="attention: tokens and vectors in registers, unrolling",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
