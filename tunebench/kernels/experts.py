"""The kernels of a mixture of experts that are the same on a CPU and on a GPU, and what the products have in common.

A *slot* is a token and one of its experts, slot s of token s / per_token. Few slots are multiplied one by one, each
with its expert's weights alone; many come grouped by expert in tiles, so that weights are read once a tile. What
chooses and groups is written as sums over all pairs rather than as a sort: every schedule can take it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.tirx import Expr, PrimFunc

from tunebench.kernels.gpu import marked
from tunebench.kernels.operation import Combine, ExpertMatmul, Group, Operation, Route

LOG2_E = 1.4426950408889634
PREFIX = "expert_"  # of the names of the arguments that hold experts' weights
MOST_TILE = 16
Weights = Callable[..., Any]
"""Of each part of a stored matrix, te tensors or buffers -> the whole [N, K], as te tensor or buffer."""
Part = tuple[str, tuple[int, ...], str]
"""Of a stored matrix: its suffix, shape and element type."""


def grouped_by(rows: int, count: int, per_token: int) -> int:
    """Slots of a tile, the power of two that an expert has on average; 0 where slots are taken one by one."""
    average = rows * per_token // count
    return min(MOST_TILE, 1 << (average - 1).bit_length()) if average > 1 else 0


def weight_at(weights: Any, n: Expr, k: Expr) -> Expr:
    """One element of a matrix: of what is stored as it is, or of the expression that it is computed by."""
    if not isinstance(weights, te.Tensor) or not isinstance(weights.op, te.ComputeOp):
        return weights[n, k]
    row, column = (axis.var for axis in weights.op.axis)
    element = PrimFunc([row, column], tirx.Evaluate(weights.op.body[0]))
    return element.specialize({row: n, column: k}).body.value


@functools.cache
def route(op: Route) -> PrimFunc:
    """Scores float32 [rows, count] -> experts int32 and weights float32, both [rows, per_token]."""
    rows, count, per_token = op.rows, op.count, op.per_token
    scores = te.placeholder((rows, count), "float32", name="scores")
    e1, e2, e3, e4, e5 = (te.reduce_axis((0, count), name="e") for _ in range(5))

    def is_ahead(i: Expr, other: Expr, e: Expr) -> Expr:
        ours, theirs = scores[i, e], scores[i, other]
        return tirx.any(theirs > ours, tirx.all(theirs == ours, other < e)).astype("int32")

    place = te.compute((rows, count), lambda i, e: te.sum(is_ahead(i, e1, e), axis=e1), name="place")
    top = te.compute((rows,), lambda i: te.max(scores[i, e2], axis=e2), name="top")
    shares = te.compute(
        (rows, count), lambda i, e: tirx.exp2((scores[i, e] - top[i]) * tirx.const(LOG2_E, "float32")), name="shares"
    )
    last = per_token if op.normalized else count
    counted = te.compute(
        (rows, count), lambda i, e: tirx.Select(place[i, e] < last, shares[i, e], tirx.const(0.0)), name="counted"
    )
    total = te.compute((rows,), lambda i: te.sum(counted[i, e3], axis=e3), name="total")
    chosen = te.compute(
        (rows, per_token), lambda i, s: te.sum(tirx.Select(place[i, e4] == s, e4, 0), axis=e4), name="chosen"
    )
    share = te.compute(
        (rows, per_token),
        lambda i, s: te.sum(tirx.Select(place[i, e5] == s, shares[i, e5], tirx.const(0.0)), axis=e5),
        name="share",
    )
    parts = te.compute((rows, per_token), lambda i, s: share[i, s] / total[i], name="parts")
    return _kernel([scores, chosen, parts], op)


@functools.cache
def group(op: Group) -> PrimFunc:
    """Experts int32 [rows, per_token] -> slots by place [tiles * tile], a tile's expert [tiles], tiles in use [1]."""
    slots, count, per_token, tile = op.slots, op.count, op.per_token, op.tile
    chosen = te.placeholder((op.rows, per_token), "int32", name="chosen")
    s1, s2, s3 = (te.reduce_axis((0, slots), name="s") for _ in range(3))
    e1, e2, e3 = (te.reduce_axis((0, count), name="e") for _ in range(3))

    def of(slot: Expr) -> Expr:
        return chosen[slot // per_token, slot % per_token]

    def one_if(*conditions: Expr) -> Expr:
        return tirx.all(*conditions).astype("int32")

    size = te.compute((count,), lambda e: te.sum(one_if(of(s1) == e), axis=s1), name="size")
    needed = te.compute((count,), lambda e: (size[e] + tile - 1) // tile, name="needed")
    first = te.compute((count,), lambda e: te.sum(tirx.Select(e1 < e, needed[e1], 0), axis=e1), name="first")
    rank = te.compute((slots,), lambda s: te.sum(one_if(s2 < s, of(s2) == of(s)), axis=s2), name="rank")
    used = te.compute((1,), lambda _: te.sum(needed[e2], axis=e2), name="used")
    begun = te.compute(
        (op.tiles,), lambda t: te.sum(one_if(first[e3] <= tirx.min(t, used[0] - 1)), axis=e3), name="begun"
    )
    experts = te.compute((op.tiles,), lambda t: begun[t] - 1, name="experts")

    def rank_at(place: Expr) -> Expr:
        t, expert = tirx.min(place // tile, used[0] - 1), experts[place // tile]
        return tirx.min((t - first[expert]) * tile + place % tile, size[expert] - 1)

    wanted = te.compute((op.tiles * tile,), rank_at, name="wanted")
    order = te.compute(
        (op.tiles * tile,),
        lambda p: te.sum(tirx.Select(tirx.all(of(s3) == experts[p // tile], rank[s3] == wanted[p]), s3, 0), axis=s3),
        name="order",
    )
    return _kernel([chosen, order, experts, used], op)


@functools.cache
def combine(op: Combine) -> PrimFunc:
    """(y [rows * per_token, width], weights float32 [rows, per_token], residual [rows, width]) -> [rows, width]."""
    rows, per_token, width = op.rows, op.per_token, op.width
    y = te.placeholder((rows * per_token, width), op.dtype, name="y")
    weights = te.placeholder((rows, per_token), "float32", name="weights")
    residual = te.placeholder((rows, width), op.dtype, name="residual")

    def total(i: Expr, j: Expr) -> Expr:
        parts = (y[i * per_token + s, j].astype("float32") * weights[i, s] for s in range(per_token))
        return sum(parts, residual[i, j].astype("float32")).astype(op.dtype)

    return _kernel([y, weights, residual, te.compute((rows, width), total, name="out")], op)


def by_slot(op: ExpertMatmul, parts: Sequence[Part], weights: Weights) -> PrimFunc:
    """(x [slots / share, k], experts int32 [tokens, per_token], parts[, bias]) -> [slots, n], a sum in float32 each."""
    x, chosen, stores, bias = arguments(op, parts)
    whole, axis = weights(*stores), te.reduce_axis((0, op.k), name="k")
    floats = te.compute(x.shape, lambda i, j: x[i, j].astype("float32"), name="x_float")
    unpacked = te.compute(
        (op.slots, op.n, op.k),
        lambda s, j, c: weight_at(whole, expert_of(op, chosen, s) * op.n + j, c).astype("float32"),
        name="dequantize",
    )
    sums = te.compute(
        (op.slots, op.n),
        lambda s, j: te.sum(floats[s // op.share, axis] * unpacked[s, j, axis], axis=axis),
        name="expert_matmul",
    )
    return finished(op, sums, x, chosen, stores, bias)


def arguments(op: ExpertMatmul, parts: Sequence[Part]) -> tuple[te.Tensor, te.Tensor, list[te.Tensor], list[te.Tensor]]:
    """te's placeholders of a product of slots: x, the experts, the parts of the weight, the bias where there is one."""
    x = te.placeholder((op.slots // op.share, op.k), op.dtype, name="x")
    chosen = te.placeholder((op.slots // op.per_token, op.per_token), "int32", name="chosen")
    stores = [te.placeholder(shape, dtype, name=PREFIX + suffix) for suffix, shape, dtype in parts]
    return x, chosen, stores, [te.placeholder((op.count * op.n,), op.dtype, name="bias")] if op.bias else []


def expert_of(op: ExpertMatmul, chosen: te.Tensor, slot: Expr) -> Expr:
    """A slot's expert."""
    return chosen[slot // op.per_token, slot % op.per_token]


def finished(
    op: ExpertMatmul,
    sums: te.Tensor,
    x: te.Tensor,
    chosen: te.Tensor,
    stores: Sequence[te.Tensor],
    bias: Sequence[te.Tensor],
) -> PrimFunc:
    """The kernel of slots' sums: with the bias, in the activations' type."""

    def whole(s: Expr, j: Expr) -> Expr:
        added = [each[expert_of(op, chosen, s) * op.n + j].astype("float32") for each in bias]
        return sum(added, sums[s, j]).astype(op.dtype)

    out = te.compute((op.slots, op.n), whole, name="out") if bias or op.dtype != "float32" else sums
    return _kernel([x, chosen, *stores, *bias, out], op)


def _kernel(tensors: Sequence[te.Tensor], op: Operation) -> PrimFunc:
    return marked(te.create_prim_func(list(tensors)).with_attr("tirx.noalias", True), op)


def touched(op: Operation | None) -> float:
    """The part of its experts' weights that a kernel reads, for random choices."""
    return 1 - (1 - op.per_token / op.count) ** (op.slots // op.per_token) if isinstance(op, ExpertMatmul) else 1.0


def indices(op: Operation | None, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    """Arguments of a kernel that say which experts, by name, for random choices."""
    if not isinstance(op, ExpertMatmul | Group):
        return {}
    tokens = op.slots // op.per_token
    chosen = np.stack([rng.permutation(op.count)[: op.per_token] for _ in range(tokens)]).astype(np.int32)
    return {"chosen": chosen, **(places(op.group, chosen) if isinstance(op, ExpertMatmul) and op.tile else {})}


def places(op: Group, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """What `group` makes of choices [rows, per_token]."""
    tiles: list[np.ndarray] = []
    experts: list[int] = []
    for expert in range(op.count):
        slots = np.flatnonzero(chosen.reshape(-1) == expert)
        for start in range(0, len(slots), op.tile):
            part = slots[start : start + op.tile]
            tiles.append(np.pad(part, (0, op.tile - len(part)), mode="edge"))
            experts.append(expert)
    used, unused = len(tiles), op.tiles - len(tiles)
    order = np.concatenate(tiles + [tiles[-1]] * unused).astype(np.int32)
    return {
        "order": order,
        "experts": np.array(experts + [experts[-1]] * unused, np.int32),
        "used": np.array([used], np.int32),
    }
