"""Products of experts' weights on a CPU.

Slot by slot, integers stay where they lie in their words, as `quantization.integer` multiplies vectors; any other
weight is made a float first. In tiles, a thread makes floats of a part of an expert's weights once and
multiplies all slots of the tile with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, Expr, PrimFunc

from tunebench.kernels import experts
from tunebench.kernels.experts import PREFIX, Part, Weights, weight_at
from tunebench.kernels.gpu import marked
from tunebench.kernels.operation import ExpertMatmul

COLUMNS = 64  # outputs of a tile at most
SHARED = {"q_scale": "q_super", "q_min": "q_super_min"}  # what a super group has beside what its groups have
DEPTH = 128  # inputs of which a part of the weights is made floats at once, at most


def expert_matmul(op: ExpertMatmul, parts: Sequence[Part], weights: Weights) -> PrimFunc:
    """(x [slots / share, k], chosen | order, experts, used; parts[, bias]) -> [slots, n]."""
    if op.tile:
        return _by_tile(op, parts, weights)
    return _in_words(op, parts) if _stays_in_words(op) else experts.by_slot(op, parts, weights)


def _stays_in_words(op: ExpertMatmul) -> bool:
    form = op.weight
    if form.kind != "integer" or form.packing != "in_order":
        return False
    return op.k % form.group_of(op.k) == 0 and form.group_of(op.k) % form.per_word == 0


def _in_words(op: ExpertMatmul, parts: Sequence[Part]) -> PrimFunc:
    """The sum over words of (sum within the word of x * integer - zero * sum of x) * scale, or with a minimum."""
    x, chosen, stores, bias = experts.arguments(op, parts)
    form, count, held = op.weight, op.weight.per_word, dict(zip((name for name, *_ in parts), stores, strict=True))
    i, j = te.reduce_axis((0, count), name="i"), te.reduce_axis((0, count), name="j")
    word = te.reduce_axis((0, op.k // count), name="word")
    group, mask = form.group_of(op.k), (1 << form.bits) - 1

    def place(i: Expr, bits: int) -> Expr:
        return tirx.const(bits, "uint32") << (i * form.bits).astype("uint32")

    def row_of(slot: Expr, output: Expr) -> Expr:
        return experts.expert_of(op, chosen, slot) * op.n + output

    placed = te.compute(
        x.shape, lambda a, b: x[a, b].astype("float32") / place(b % count, 1).astype("float32"), name="x_placed"
    )
    x_sum = te.compute(
        (x.shape[0], op.k // count), lambda a, b: te.sum(x[a, b * count + j].astype("float32"), axis=j), name="x_sum"
    )
    words = held["q_weight"]
    dot = te.compute(
        (op.slots, op.n, op.k // count),
        lambda a, b, c: te.sum(
            placed[a // op.share, c * count + i] * (words[row_of(a, b), c] & place(i, mask)).astype("float32"), axis=i
        ),
        name="dot",
    )

    def of_group(name: str) -> te.Tensor:
        """What each group of a slot's weights has, with what its super group has."""

        def value(a: Expr, b: Expr, g: Expr) -> Expr:
            own = held[name][row_of(a, b), g].astype("float32")
            if SHARED.get(name) not in held:
                return own
            return own * held[SHARED[name]][row_of(a, b), g * group // form.super_group].astype("float32")

        return te.compute((op.slots, op.n, op.k // group), value, name=name.replace("q_", "group_"))

    stages = {name: of_group(name) for name in ("q_scale", "q_zero", "q_min") if name in held}

    def scaled(a: Expr, b: Expr) -> Expr:
        of_word = {name: stage[a, b, word * count // group] for name, stage in stages.items()}
        total = x_sum[a // op.share, word]
        if form.zero == "minimum":
            return dot[a, b, word] * of_word["q_scale"] + total * of_word["q_min"]
        return (dot[a, b, word] - total * of_word.get("q_zero", float(form.zero_point))) * of_word["q_scale"]

    sums = te.compute((op.slots, op.n), lambda a, b: te.sum(scaled(a, b), axis=word), name="expert_matmul")
    return experts.finished(op, sums, x, chosen, stores, bias)


def _by_tile(op: ExpertMatmul, parts: Sequence[Part], weights: Weights) -> PrimFunc:
    """Tiles of slots by columns of outputs; a tile that is not in use does nothing."""
    columns = max(size for size in range(1, COLUMNS + 1) if op.n % size == 0)
    with IRBuilder() as built, T.prim_func(private=True, s_tir=True):
        x = T.arg("x", T.Buffer((op.slots // op.share, op.k), op.dtype))
        order = T.arg("order", T.Buffer((op.group.tiles * op.tile,), "int32"))
        expert = T.arg("experts", T.Buffer((op.group.tiles,), "int32"))
        used = T.arg("used", T.Buffer((1,), "int32"))
        stores = [T.arg(PREFIX + suffix, T.Buffer(shape, dtype)) for suffix, shape, dtype in parts]
        bias = [T.arg("bias", T.Buffer((op.count * op.n,), op.dtype))] if op.bias else []
        out = T.arg("out", T.Buffer((op.slots, op.n), op.dtype))
        T.func_attr({"tirx.noalias": True})
        with T.grid(op.n // columns, op.group.tiles) as (c, t), T.sblock("tile"):
            column, tile = T.axis.spatial(op.n // columns, c), T.axis.spatial(op.group.tiles, t)
            T.reads(*(_all(buffer) for buffer in (x, order, expert, used, *stores, *bias)))
            T.writes(out[0 : op.slots, column * columns : column * columns + columns])
            here = weights(*stores), expert[tile] * op.n + column * columns
            _tile(op, x, order, here, tirx.Select(tile < used[0], 1, 0), tile, (columns, column), bias, out)
    return marked(built.get(), op)


def _tile(
    op: ExpertMatmul,
    x: Buffer,
    order: Buffer,
    here: tuple[te.Tensor | Buffer, Expr],  # the weights, and the first row of them
    is_used: Expr,
    tile: Expr,
    columns: tuple[int, Expr],  # outputs of a block, and which block
    bias: Sequence[Buffer],
    out: Buffer,
) -> None:
    depth = max(size for size in range(1, DEPTH + 1) if op.k % size == 0)
    width, block = columns
    weights, first = here
    inputs = T.sblock_alloc_buffer((op.tile, depth), "float32")
    part = T.sblock_alloc_buffer((depth, width), "float32")
    sums = T.sblock_alloc_buffer((op.tile, width), "float32")
    with T.serial(0, is_used * (op.k // depth)) as step:
        with T.grid(op.tile, depth) as (r, d), T.sblock("x_float"):
            s, row, deep = _axes("SSS", (op.k // depth, step), (op.tile, r), (depth, d))
            of_slot = x[order[tile * op.tile + row] // op.share, s * depth + deep]
            T.buffer_store(inputs, of_slot.astype("float32"), [row, deep])
        with T.grid(depth, width) as (d, j), T.sblock("dequantize"):
            s, deep, column = _axes("SSS", (op.k // depth, step), (depth, d), (width, j))
            weight = weight_at(weights, first + column, s * depth + deep)
            T.buffer_store(part, weight.astype("float32"), [deep, column])
        with T.grid(op.tile, width, depth) as (r, j, d), T.sblock("matmul"):
            s, row, column, deep = _axes("RSSR", (op.k // depth, step), (op.tile, r), (width, j), (depth, d))
            with T.init():
                T.buffer_store(sums, tirx.const(0.0, "float32"), [row, column])
            T.buffer_store(sums, sums[row, column] + inputs[row, deep] * part[deep, column], [row, column])
    with T.serial(0, is_used * op.tile) as r, T.serial(0, width) as j:
        added = [each[first + j].astype("float32") for each in bias]
        whole = sum(added, sums[r, j]).astype(op.dtype)
        T.buffer_store(out, whole, [order[tile * op.tile + r], block * width + j])


def _axes(kinds: str, *bound: tuple[int, Expr]) -> list[Expr]:
    """Axes of a block by extent and loop: S spatial, R of a reduction."""
    make = {"S": T.axis.spatial, "R": T.axis.reduce}
    return [make[kind](extent, loop) for kind, (extent, loop) in zip(kinds, bound, strict=True)]


def _all(buffer: Buffer) -> Expr:
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]
