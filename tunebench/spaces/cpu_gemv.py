"""Quantized matrix-vector products on a CPU: decode.

The kernel is quantization/group.py's: `x_placed`, `x_sum`, `dot` (within a word), `matmul` (over words, with
the scale), then a chain of element-wise blocks. Vectors hold words: along K where weights are N-major, with
the activations laid out so that each nibble's vector is contiguous and one horizontal sum a row at the end;
along N where they are K-major, with an accumulator a column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.spaces import Kernel, Space, dividing, sample

if TYPE_CHECKING:
    from tvm import s_tir

HEAD = ("x_placed", "dot", "x_sum", "matmul")


def _extents(sch: s_tir.Schedule, block: str) -> list[int]:
    return [int(sch.get(loop).extent) for loop in sch.get_loops(sch.get_sblock(block))]


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    return kernel.blocks[:4] == HEAD and _extents(sch, "matmul")[0] == 1


def _is_n_major(sch: s_tir.Schedule) -> bool:
    """Whether a row of weights is contiguous: the words are the read buffer of integers, [N, words]."""
    weight = next(r.source for r in sch.get(sch.get_sblock("dot")).reads if str(r.source.dtype) == "uint32")
    return int(weight.shape[0]) == _extents(sch, "dot")[1]


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    last = _inline_epilogue(sch, kernel)
    return [_n_major(sch, kernel, last) if _is_n_major(sch) else _k_major(sch, kernel, last)]


def _inline_epilogue(sch: s_tir.Schedule, kernel: Kernel) -> str:
    """Fold all but the last element-wise block into it; its name, or `matmul` where there is none."""
    tail = kernel.blocks[4:]
    for name in tail[:-1]:
        sch.compute_inline(sch.get_sblock(name))
    return tail[-1] if tail else "matmul"


def _vector(words: int, lanes: int) -> int:
    """The longest vector of words that divides a row."""
    return max(size for size in dividing(words, [2, 4, 8, 16, 32]) if size <= lanes)


def _n_major(sch: s_tir.Schedule, kernel: Kernel, last: str) -> s_tir.Schedule:
    _, n, words = _extents(sch, "matmul")
    count = _extents(sch, "dot")[3]
    lanes = _vector(words, kernel.lanes)
    rows = sample(sch, dividing(n, [1, 2, 4, 8]))
    unrolled = sample(sch, dividing(words // lanes, [1, 2, 4, 8]))
    grain = sample(sch, dividing(n // 8 if n % 8 == 0 else 1, [1, 4, 16]))
    dot, matmul = sch.get_sblock("dot"), sch.get_sblock("matmul")

    def by_place(m: int, k: int) -> tuple[int, ...]:
        return (m, k // (count * lanes), k % count, k // count % lanes)

    placed = sch.get_sblock("x_placed")
    sch.transform_layout(placed, ("write", 0), by_place)
    sch.transform_block_layout(placed, by_place)
    scales = sch.cache_read(matmul, 2, "global")
    m, row, word = sch.get_loops(matmul)
    outer, group, inner_row = sch.split(row, [None, grain, rows])
    step, vector, lane = sch.split(word, [None, unrolled, lanes])
    sch.reorder(m, outer, group, step, inner_row, vector, lane)
    partial = sch.rfactor(lane, factor_axis=2)
    m, outer, group, step, inner_row, vector, lane = sch.get_loops(partial)
    sch.compute_at(scales, inner_row)
    sch.vectorize(sch.get_loops(scales)[-1])
    sch.compute_at(dot, vector)
    _vectorize_dot(sch, dot)
    sch.vectorize(lane)
    sch.unroll(inner_row)
    sch.unroll(vector)
    sch.reverse_compute_at(matmul, group)
    _unroll_all(sch, matmul, skip=3)
    if last != "matmul":
        sch.reverse_compute_at(sch.get_sblock(last), group)
        _unroll_all(sch, sch.get_sblock(last), skip=3)
    sch.parallel(sch.fuse(m, outer))
    _split_init(sch, partial, step)
    _split_init(sch, dot, sch.get_loops(dot)[-2])
    return sch


def _k_major(sch: s_tir.Schedule, kernel: Kernel, last: str) -> s_tir.Schedule:
    _, n, words = _extents(sch, "matmul")
    lanes = _vector(n, kernel.lanes)
    tiles = sample(sch, dividing(n // lanes, [1, 2, 4, 8, 16, 32, 64]))
    unrolled = sample(sch, dividing(words, [1, 2, 4, 8]))
    dot, matmul = sch.get_sblock("dot"), sch.get_sblock("matmul")
    m, column, word = sch.get_loops(matmul)
    outer, tile, lane = sch.split(column, [None, tiles, lanes])
    step, inner_word = sch.split(word, [None, unrolled])
    sch.reorder(m, outer, step, tile, inner_word, lane)
    sch.compute_at(dot, inner_word)
    _vectorize_dot(sch, dot)
    sch.unroll(inner_word)
    sch.vectorize(lane)
    if last != "matmul":
        final = sch.get_sblock(last)
        sch.reverse_compute_at(final, outer)
        _, vector = sch.split(sch.get_loops(final)[-1], [None, lanes])
        sch.vectorize(vector)
    sch.parallel(sch.fuse(m, outer))
    _split_init(sch, matmul, step)
    _split_init(sch, dot, sch.get_loops(dot)[-2])
    return sch


def _vectorize_dot(sch: s_tir.Schedule, dot: s_tir.schedule.SBlockRV) -> None:
    word, place = sch.get_loops(dot)[-2:]
    sch.reorder(place, word)
    sch.unroll(place)
    sch.vectorize(word)


def _unroll_all(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, skip: int) -> None:
    for loop in sch.get_loops(block)[skip:]:
        sch.unroll(loop)


def _split_init(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> None:
    """Move the initial zeros out of the reduction, in vectors."""
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, loop))[-1])


SPACES = (
    Space(
        name="cpu-gemv",
        summary="quantized matrix-vector product: words in vectors, rows a step, unrolling, split of the work",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
