"""Matrix-vector products on a CPU: decode.

Quantized, the kernel is model/quantization/integer.py's: `x_placed`, `dot` (within a word), `x_sum`, where there are
super groups `group_scale` and `group_min`, `matmul` (over words, with the scale), then element-wise blocks. Vectors hold words: along K where weights are N-major, with
the activations laid out so that the vector for each place in the word is contiguous, and one horizontal sum a
row at the end; along N where they are K-major, with an accumulator a column. Plain weights are N-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunebench.tuning.spaces import (
    Kernel,
    Space,
    dividing,
    extents,
    inline_epilogue,
    sample,
    split_init,
    unroll_inner,
    vector,
)

if TYPE_CHECKING:
    from tvm import s_tir
    from tvm.s_tir.schedule import LoopRV, SBlockRV

QUANTIZED = ("x_placed", "dot", "x_sum")
OF_GROUP = ("group_scale", "group_min")
PLAIN = ("x_float", "dequantize", "matmul")


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    if kernel.blocks[:3] == QUANTIZED:
        return extents(sch, "matmul")[0] == 1
    return kernel.blocks[:3] == PLAIN and extents(sch, "matmul")[0] == 1


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    last = inline_epilogue(sch, kernel, "matmul")
    if kernel.blocks[:3] == PLAIN:
        return [_plain(sch, kernel, last)]
    return [_n_major(sch, kernel, last) if _is_n_major(sch) else _k_major(sch, kernel, last)]


def _is_n_major(sch: s_tir.Schedule) -> bool:
    """Whether a row of weights is contiguous: the words are the read buffer of integers, [N, words]."""
    weight = next(r.source for r in sch.get(sch.get_sblock("dot")).reads if str(r.source.dtype) == "uint32")
    return int(weight.shape[0]) == extents(sch, "dot")[1]


def _n_major(sch: s_tir.Schedule, kernel: Kernel, last: str) -> s_tir.Schedule:
    words, count = extents(sch, "matmul")[2], extents(sch, "dot")[3]
    lanes = vector(words, kernel.lanes)
    place_by_lane(sch, count, lanes)
    matmul = sch.get_sblock("matmul")
    n_major(sch, matmul, _of_groups(sch, kernel, matmul), last, lanes)
    return sch


def place_by_lane(sch: s_tir.Schedule, count: int, lanes: int) -> None:
    """Lay activations out such that those which a vector of words has at one place are contiguous."""

    def by_place(m: int, k: int) -> tuple[int, ...]:
        return (m, k // (count * lanes), k % count, k // count % lanes)

    placed = sch.get_sblock("x_placed")
    sch.transform_layout(placed, ("write", 0), by_place)
    sch.transform_block_layout(placed, by_place)


def n_major(sch: s_tir.Schedule, matmul: SBlockRV, of_groups: Sequence[SBlockRV], last: str, lanes: int) -> None:
    """Rows of words in vectors; blocks `of_groups` make what the groups of a row have."""
    dot = sch.get_sblock("dot")
    partial, group, row, part = split_rows(sch, matmul, lanes)
    for held in of_groups:
        sch.compute_at(held, row, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(held)[-1])
    sch.compute_at(dot, part, preserve_unit_loops=True)
    place = vectorize_dot(sch, dot)
    finish_rows(sch, partial, matmul, last, group)
    split_init(sch, dot, place)


def _of_groups(sch: s_tir.Schedule, kernel: Kernel, matmul: SBlockRV) -> list[SBlockRV]:
    """What `matmul` reads beside the sums, as blocks that copy or compute a row of it."""
    computed = [sch.get_sblock(name) for name in kernel.blocks if name in OF_GROUP]
    stored = range(2, len(sch.get(matmul).reads)) if not computed else ()
    return computed or [sch.cache_read(matmul, place, "global") for place in stored]


def _plain(sch: s_tir.Schedule, kernel: Kernel, last: str) -> s_tir.Schedule:
    sch.compute_inline(sch.get_sblock("dequantize"))
    matmul = sch.get_sblock("matmul")
    partial, group, _, _ = split_rows(sch, matmul, vector(extents(sch, "matmul")[2], kernel.lanes))
    finish_rows(sch, partial, matmul, last, group)
    return sch


def split_rows(sch: s_tir.Schedule, matmul: SBlockRV, lanes: int) -> tuple[SBlockRV, LoopRV, LoopRV, LoopRV]:
    """Rows by threads, groups and rows a step; the reduction by steps, vectors and lanes, each lane its own sum."""
    _, n, k = (int(sch.get(loop).extent) for loop in sch.get_loops(matmul))
    rows = sample(sch, dividing(n, [1, 2, 4]))
    unrolled = sample(sch, dividing(k // lanes, [1, 2, 4, 8]))
    grain = sample(sch, dividing(n // 4 if n % 4 == 0 else 1, [1, 4, 16]))
    m, row, reduced = sch.get_loops(matmul)
    outer, group, inner_row = sch.split(row, [None, grain, rows])
    step, part, lane = sch.split(reduced, [None, unrolled, lanes])
    sch.reorder(m, outer, group, step, inner_row, part, lane)
    partial = sch.rfactor(lane, factor_axis=2)
    _, _, group, _, inner_row, part, lane = sch.get_loops(partial)
    sch.vectorize(lane)
    sch.unroll(inner_row)
    sch.unroll(part)
    return partial, group, inner_row, part


def finish_rows(sch: s_tir.Schedule, partial: SBlockRV, matmul: SBlockRV, last: str, group: LoopRV) -> None:
    """The sums of lanes and what comes behind, a group at a time; the work of all threads."""
    m, outer, _, step = sch.get_loops(partial)[:4]
    for block in [matmul] if last == sch.get(matmul).name_hint else [matmul, sch.get_sblock(last)]:
        sch.reverse_compute_at(block, group, preserve_unit_loops=True)
        unroll_inner(sch, block, skip=3)
    sch.parallel(sch.fuse(m, outer))
    split_init(sch, partial, step)


def _k_major(sch: s_tir.Schedule, kernel: Kernel, last: str) -> s_tir.Schedule:
    _, n, words = extents(sch, "matmul")
    lanes = vector(n, kernel.lanes)
    tiles = sample(sch, dividing(n // lanes, [1, 2, 4, 8, 16, 32, 64, 128, 256]))
    unrolled = sample(sch, dividing(words, [1, 2, 4, 8, 16]))
    dot, matmul = sch.get_sblock("dot"), sch.get_sblock("matmul")
    m, column, word = sch.get_loops(matmul)
    outer, tile, lane = sch.split(column, [None, tiles, lanes])
    step, inner_word = sch.split(word, [None, unrolled])
    sch.reorder(m, outer, step, tile, inner_word, lane)
    sch.compute_at(dot, inner_word, preserve_unit_loops=True)
    place = vectorize_dot(sch, dot)
    sch.unroll(inner_word)
    sch.vectorize(lane)
    if last != "matmul":
        final = sch.get_sblock(last)
        sch.reverse_compute_at(final, outer, preserve_unit_loops=True)
        sch.vectorize(sch.split(sch.get_loops(final)[-1], [None, lanes])[1])
    sch.parallel(sch.fuse(m, outer))
    split_init(sch, matmul, step)
    split_init(sch, dot, place)
    return sch


def vectorize_dot(sch: s_tir.Schedule, dot: SBlockRV) -> LoopRV:
    """The last three loops of `dot` are N or its vector, the words, and the place: put the place outermost."""
    *_, column, word, place = sch.get_loops(dot)
    lanes = word if int(sch.get(word).extent) > 1 else column
    sch.reorder(place, column, word)
    sch.unroll(place)
    sch.vectorize(lanes)
    return place


SPACES = (
    Space(
        name="cpu-gemv",
        summary="matrix-vector product: words in vectors, rows a step, unrolling, split of the work",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
