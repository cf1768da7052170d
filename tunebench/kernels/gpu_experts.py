"""Products of experts' weights on a GPU, in plain form."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from tunebench.kernels import experts
from tunebench.kernels.experts import PREFIX, Part, Weights, weight_at
from tunebench.kernels.gpu import marked
from tunebench.kernels.operation import ExpertMatmul


def expert_matmul(op: ExpertMatmul, parts: Sequence[Part], weights: Weights) -> PrimFunc:
    """(x [slots / share, k], chosen | order, experts, used; parts[, bias]) -> [slots, n]."""
    return _by_tile(op, parts, weights) if op.tile else experts.by_slot(op, parts, weights)


def _by_tile(op: ExpertMatmul, parts: Sequence[Part], weights: Weights) -> PrimFunc:
    """Sums by place, which then go to their slots; the same one twice where a tile is filled up."""
    places = op.group.tiles * op.tile
    with IRBuilder() as built, T.prim_func(private=True, s_tir=True):
        x = T.arg("x", T.Buffer((op.slots // op.share, op.k), op.dtype))
        order = T.arg("order", T.Buffer((places,), "int32"))
        expert = T.arg("experts", T.Buffer((op.group.tiles,), "int32"))
        T.arg("used", T.Buffer((1,), "int32"))
        stores = [T.arg(PREFIX + suffix, T.Buffer(shape, dtype)) for suffix, shape, dtype in parts]
        bias = [T.arg("bias", T.Buffer((op.count * op.n,), op.dtype))] if op.bias else []
        out = T.arg("out", T.Buffer((op.slots, op.n), op.dtype))
        T.func_attr({"tirx.noalias": True})
        sums = T.sblock_alloc_buffer((places, op.n), "float32")
        whole = weights(*stores)
        with T.grid(places, op.n, op.k) as (p, j, d), T.sblock("matmul"):
            place, column = T.axis.spatial(places, p), T.axis.spatial(op.n, j)
            deep = T.axis.reduce(op.k, d)
            with T.init():
                T.buffer_store(sums, tirx.const(0.0, "float32"), [place, column])
            weight = weight_at(whole, expert[place // op.tile] * op.n + column, deep).astype("float32")
            product = x[order[place] // op.share, deep].astype("float32") * weight
            T.buffer_store(sums, sums[place, column] + product, [place, column])
        with T.grid(places, op.n) as (p, j), T.sblock("out"):
            place, column = T.axis.spatial(places, p), T.axis.spatial(op.n, j)
            added = [each[expert[place // op.tile] * op.n + column].astype("float32") for each in bias]
            y = sum(added, sums[place, column]).astype(op.dtype)
            T.buffer_store(out, y, [order[place], column])
    return marked(built.get(), op)
