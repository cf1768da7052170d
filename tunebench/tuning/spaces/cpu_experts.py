"""Products of experts' weights on a CPU.

Slot by slot they are matrix-vector products, scheduled as those are. In tiles, the kernel is
`kernels.cpu_experts`: a block of sums of a few slots with some vectors of outputs stays in registers, and what is
made of a part of the weights in a core's cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, extents, inline_epilogue, sample, split_init, vector
from tunebench.tuning.spaces.cpu_gemv import finish_rows, n_major, place_by_lane, split_rows

if TYPE_CHECKING:
    from tvm import s_tir

PRODUCT = "expert_matmul"
OF_GROUPS = ("group_scale", "group_zero", "group_min")
WORD = 8  # weights of one word of 4 bits, which share what is loaded


def _matches_slots(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return PRODUCT in kernel.blocks


def _generate_slots(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    last, product = inline_epilogue(sch, kernel, PRODUCT), sch.get_sblock(PRODUCT)
    lanes = vector(extents(sch, PRODUCT)[2], kernel.lanes)
    if "dot" in kernel.blocks:
        place_by_lane(sch, extents(sch, "dot")[3], lanes)
        held = [sch.get_sblock(name) for name in OF_GROUPS if name in kernel.blocks]
        n_major(sch, product, held, last, lanes)
        return [sch]
    sch.compute_inline(sch.get_sblock("dequantize"))
    partial, group, _, _ = split_rows(sch, product, lanes)
    finish_rows(sch, partial, product, last, group)
    return [sch]


def _matches_tiles(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return kernel.blocks == ("tile",)


def _generate_tiles(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    matmul = sch.get_sblock("matmul")
    step, row, column, deep = sch.get_loops(matmul)[-4:]
    tile, width, depth = (int(sch.get(loop).extent) for loop in (row, column, deep))
    lanes = vector(width, kernel.lanes)
    vectors, rows = sample(sch, dividing(width // lanes, [1, 2, 4])), sample(sch, dividing(tile, [2, 4, 8]))
    block, inner_row = sch.split(row, [None, rows])
    columns, inner_column, lane = sch.split(column, [None, vectors, lanes])
    outer, inner = sch.split(deep, [None, sample(sch, dividing(depth, [1, 2, 4]))])
    sch.reorder(block, columns, outer, inner, inner_row, inner_column, lane)
    sch.vectorize(lane)
    for loop in (inner, inner_row, inner_column):
        sch.unroll(loop)
    _float_inputs(sch, lanes)
    _float_weights(sch, lanes)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("tile"))))
    split_init(sch, matmul, step)
    return [sch]


def _float_inputs(sch: s_tir.Schedule, lanes: int) -> None:
    deep = sch.get_loops(sch.get_sblock("x_float"))[-1]
    sch.vectorize(sch.split(deep, [None, vector(int(sch.get(deep).extent), lanes)])[1])


def _float_weights(sch: s_tir.Schedule, lanes: int) -> None:
    """Vectors of columns, and the weights of one word together."""
    deep, column = sch.get_loops(sch.get_sblock("dequantize"))[-2:]
    outer, lane = sch.split(column, [None, lanes])
    word, place = sch.split(deep, [None, max(dividing(int(sch.get(deep).extent), [2, 4, WORD]))])
    sch.reorder(outer, word, place, lane)
    sch.unroll(place)
    sch.vectorize(lane)


def _matches_choice(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return {"place", "rank"} & set(kernel.blocks) != set()


def _generate_choice(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    """One thread, or all of them for each block: it is small, and what counts pairs vectorizes by itself."""
    serial = sch.copy()
    for name in kernel.blocks:
        sch.parallel(sch.get_loops(sch.get_sblock(name))[0])
    return [serial, sch]


SPACES = (
    Space(
        name="cpu-experts-choice",
        summary="which experts, and slots by expert: by one thread or by all",
        device="cpu",
        matches=_matches_choice,
        generate=_generate_choice,
    ),
    Space(
        name="cpu-experts",
        summary="experts slot by slot: words in vectors, rows a step, unrolling, split of the work",
        device="cpu",
        matches=_matches_slots,
        generate=_generate_slots,
    ),
    Space(
        name="cpu-experts-tiles",
        summary="experts by tiles of slots: register block, unrolling",
        device="cpu",
        matches=_matches_tiles,
        generate=_generate_tiles,
    ),
)
