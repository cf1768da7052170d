"""The kernels of linear attention by the gated delta rule, the same on a CPU and on a GPU but for their vectors.

In place of keys and values a layer keeps the last inputs of its convolution, float32 [b, taps - 1, channels], and for
each head a matrix, float32 [b, H, D, E], that each token decays, corrects and reads. Both are updated in place, by the
tokens of a chunk up to `last_token`, and are taken as zero at position 0. A step is therefore not to be run twice.
Blocks do not declare that they read their state: schedules would take what is read and written for a race.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tvm import te, tirx
from tvm.script import tirx as T
from tvm.tirx import Expr, PrimFunc

from tunebench.kernels.arithmetic import sigmoid
from tunebench.kernels.gpu import marked
from tunebench.kernels.operation import CausalConv, DeltaInputs, DeltaRule, GateBy, GatedNorm, LeaveOut, Operation
from tunebench.kernels.tvmscript import quick_parsing

LANES = 16
UNIT_EPSILON = 1e-6  # of the queries' and keys' lengths


def _place(extent: int, on_gpu: bool) -> tuple[int, str]:
    """Elements that a vector has, and where a block's own values lie."""
    lanes = 1 if on_gpu else max(size for size in range(1, LANES + 1) if extent % size == 0)
    return lanes, "local" if on_gpu else "global"


@functools.cache
def causal_conv(op: CausalConv, on_gpu: bool) -> PrimFunc:
    """(x [b, m, columns], weight float32 [channels * taps], position, last_token, state) -> float32 [b, m, channels].

    A channel's `taps` last inputs, weighted, and silu of the sum. x's first columns are the channels.
    """
    b, m, channels, columns, taps, dtype = op.b, op.m, op.channels, op.columns, op.taps, op.dtype
    lanes, scope = _place(channels, on_gpu)

    with quick_parsing():

        @T.prim_func(private=True, s_tir=True)
        def causal_conv(
            x: T.Buffer((b, m, columns), dtype),
            weight: T.Buffer((channels * taps,), "float32"),
            position: T.Buffer((1,), "int32"),
            last_token: T.Buffer((1,), "int32"),
            state: T.Buffer((b, taps - 1, channels), "float32"),
            out: T.Buffer((b, m, channels), "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            for ib, ic in T.grid(b, channels // lanes):
                with T.sblock("row"):
                    vb, vc = T.axis.remap("SS", [ib, ic])
                    T.reads(
                        x[vb, 0:m, vc * lanes : vc * lanes + lanes],
                        weight[vc * lanes * taps : vc * lanes * taps + lanes * taps],
                        position[0],
                        last_token[0],
                    )
                    T.writes(
                        state[vb, 0 : taps - 1, vc * lanes : vc * lanes + lanes],
                        out[vb, 0:m, vc * lanes : vc * lanes + lanes],
                    )
                    seen = T.sblock_alloc_buffer((taps, lanes), "float32", scope=scope)
                    total = T.sblock_alloc_buffer((lanes,), "float32", scope=scope)
                    for j in range(taps - 1):
                        for lane in T.vectorized(lanes):
                            seen[j, lane] = T.Select(position[0] > 0, state[vb, j, vc * lanes + lane], T.float32(0))
                    for i in range(m):
                        for lane in T.vectorized(lanes):
                            seen[taps - 1, lane] = T.Cast("float32", x[vb, i, vc * lanes + lane])
                        for lane in T.vectorized(lanes):
                            total[lane] = T.float32(0)
                        for j in range(taps):
                            for lane in T.vectorized(lanes):
                                total[lane] = total[lane] + seen[j, lane] * weight[(vc * lanes + lane) * taps + j]
                        for lane in T.vectorized(lanes):
                            out[vb, i, vc * lanes + lane] = total[lane] * sigmoid(total[lane])
                        if i <= last_token[0]:
                            for j in range(taps - 1):
                                for lane in T.vectorized(lanes):
                                    seen[j, lane] = seen[j + 1, lane]
                    for j in range(taps - 1):
                        for lane in T.vectorized(lanes):
                            state[vb, j, vc * lanes + lane] = seen[j, lane]

    return marked(causal_conv, op)


@functools.cache
def delta_inputs(op: DeltaInputs) -> PrimFunc:
    """(mixed float32 [rows, channels], betas and decays [rows, 2 H], slopes and offsets float32 [H]) -> two of float32.

    Queries and keys [rows, 2 G, D], each of length 1, queries then times D^-1/2; and [rows, 2, H] of what a token's
    state is multiplied with and the share of the correction that it takes.
    """
    rows, heads, dim, value_heads = op.rows, 2 * op.key_heads, op.key_dim, op.value_heads
    mixed = te.placeholder((rows, op.channels), "float32", name="mixed")
    given = te.placeholder((rows, 2 * value_heads), op.dtype, name="given")
    slopes, offsets = (te.placeholder((value_heads,), "float32", name=name) for name in ("slopes", "offsets"))
    d = te.reduce_axis((0, dim), name="d")
    squares = te.compute(
        (rows, heads), lambda i, h: te.sum(mixed[i, h * dim + d] * mixed[i, h * dim + d], axis=d), name="squares"
    )

    def unit(i: Expr, h: Expr, e: Expr) -> Expr:
        scale = tirx.Select(h < op.key_heads, tirx.const(dim**-0.5, "float32"), tirx.const(1, "float32"))
        return mixed[i, h * dim + e] * tirx.rsqrt(squares[i, h] + tirx.const(UNIT_EPSILON, "float32")) * scale

    def factor(i: Expr, which: Expr, h: Expr) -> Expr:
        step = given[i, value_heads + h].astype("float32") + offsets[h]
        one = tirx.const(1, "float32")
        softplus = tirx.max(step, tirx.const(0, "float32")) + tirx.log(one + tirx.exp(-tirx.abs(step)))
        decay = tirx.exp(-tirx.exp(slopes[h]) * softplus)
        return tirx.Select(which == 0, decay, one / (one + tirx.exp(-given[i, h].astype("float32"))))

    units = te.compute((rows, heads, dim), unit, name="units")
    factors = te.compute((rows, 2, value_heads), factor, name="factors")
    return _kernel([mixed, given, slopes, offsets, units, factors], op)


@functools.cache
def delta_rule(op: DeltaRule, on_gpu: bool) -> PrimFunc:
    """(units, factors, mixed, position, last_token, state) -> float32 [b, m, H, E]; the first two of `delta_inputs`.

    For each token, S decays; S += k (v - S k) beta; S q comes out. mixed's last H * E channels are the values v.
    """
    b, m, key_heads, heads, dim, wide = op.b, op.m, op.key_heads, op.value_heads, op.key_dim, op.value_dim
    share, first = heads // key_heads, 2 * key_heads * dim
    lanes, scope = _place(wide, on_gpu)

    with quick_parsing():

        @T.prim_func(private=True, s_tir=True)
        def delta_rule(
            units: T.Buffer((b, m, 2 * key_heads, dim), "float32"),
            factors: T.Buffer((b, m, 2, heads), "float32"),
            mixed: T.Buffer((b, m, first + heads * wide), "float32"),
            position: T.Buffer((1,), "int32"),
            last_token: T.Buffer((1,), "int32"),
            state: T.Buffer((b, heads, dim, wide), "float32"),
            out: T.Buffer((b, m, heads, wide), "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            for ib, ih, ie in T.grid(b, heads, wide // lanes):
                with T.sblock("row"):
                    vb, vh, ve = T.axis.remap("SSS", [ib, ih, ie])
                    T.reads(
                        units[vb, 0:m, 0 : 2 * key_heads, 0:dim],
                        factors[vb, 0:m, 0:2, vh],
                        mixed[vb, 0:m, first + vh * wide + ve * lanes : first + vh * wide + ve * lanes + lanes],
                        position[0],
                        last_token[0],
                    )
                    T.writes(
                        state[vb, vh, 0:dim, ve * lanes : ve * lanes + lanes],
                        out[vb, 0:m, vh, ve * lanes : ve * lanes + lanes],
                    )
                    held = T.sblock_alloc_buffer((dim, lanes), "float32", scope=scope)
                    known = T.sblock_alloc_buffer((lanes,), "float32", scope=scope)
                    total = T.sblock_alloc_buffer((lanes,), "float32", scope=scope)
                    for d in range(dim):
                        for lane in T.vectorized(lanes):
                            held[d, lane] = T.Select(position[0] > 0, state[vb, vh, d, ve * lanes + lane], T.float32(0))
                    for i in range(m):
                        if i <= last_token[0]:
                            for lane in T.vectorized(lanes):
                                known[lane] = T.float32(0)
                            for d in range(dim):
                                for lane in T.vectorized(lanes):
                                    held[d, lane] = held[d, lane] * factors[vb, i, 0, vh]
                                for lane in T.vectorized(lanes):
                                    known[lane] = known[lane] + held[d, lane] * units[vb, i, key_heads + vh // share, d]
                            for lane in T.vectorized(lanes):
                                known[lane] = (
                                    mixed[vb, i, first + vh * wide + ve * lanes + lane] - known[lane]
                                ) * factors[vb, i, 1, vh]
                            for lane in T.vectorized(lanes):
                                total[lane] = T.float32(0)
                            for d in range(dim):
                                for lane in T.vectorized(lanes):
                                    held[d, lane] = (
                                        held[d, lane] + units[vb, i, key_heads + vh // share, d] * known[lane]
                                    )
                                for lane in T.vectorized(lanes):
                                    total[lane] = total[lane] + held[d, lane] * units[vb, i, vh // share, d]
                            for lane in T.vectorized(lanes):
                                out[vb, i, vh, ve * lanes + lane] = total[lane]
                        else:
                            for lane in T.vectorized(lanes):
                                out[vb, i, vh, ve * lanes + lane] = T.float32(0)
                    for d in range(dim):
                        for lane in T.vectorized(lanes):
                            state[vb, vh, d, ve * lanes + lane] = held[d, lane]

    return marked(delta_rule, op)


@functools.cache
def gated_norm(op: GatedNorm) -> PrimFunc:
    """(x float32 [rows, H, E], weight float32 [E], gates [rows, columns]) -> [rows, H * E].

    Each head's elements by their root mean square, weighted, times silu of the gates, the last H * E columns.
    """
    rows, heads, dim, first = op.rows, op.heads, op.dim, op.columns - op.heads * op.dim
    x = te.placeholder((rows, heads, dim), "float32", name="x")
    weight = te.placeholder((dim,), "float32", name="weight")
    gates = te.placeholder((rows, op.columns), op.dtype, name="gates")
    d = te.reduce_axis((0, dim), name="d")
    squares = te.compute((rows, heads), lambda i, h: te.sum(x[i, h, d] * x[i, h, d], axis=d), name="squares")

    def gated(i: Expr, j: Expr) -> Expr:
        mean = squares[i, j // dim] / tirx.const(dim, "float32")
        normed = x[i, j // dim, j % dim] * tirx.rsqrt(mean + tirx.const(op.epsilon, "float32")) * weight[j % dim]
        gate = gates[i, first + j].astype("float32")
        return (normed * gate * sigmoid(gate)).astype(op.dtype)

    return _kernel([x, weight, gates, te.compute((rows, heads * dim), gated, name="out")], op)


@functools.cache
def gate_by(op: GateBy) -> PrimFunc:
    """(x [rows, width], gates [rows, columns]) -> x * sigmoid(the gates' columns from `first` on), [rows, width]."""
    x = te.placeholder((op.rows, op.width), op.dtype, name="x")
    gates = te.placeholder((op.rows, op.columns), op.dtype, name="gates")
    out = te.compute(
        (op.rows, op.width),
        lambda i, j: (x[i, j].astype("float32") * sigmoid(gates[i, op.first + j].astype("float32"))).astype(op.dtype),
        name="out",
    )
    return _kernel([x, gates, out], op)


@functools.cache
def leave_out(op: LeaveOut) -> PrimFunc:
    """x [rows, columns] -> the columns before `first` and those from `first + width` on."""
    x = te.placeholder((op.rows, op.columns), op.dtype, name="x")
    out = te.compute(
        (op.rows, op.columns - op.width),
        lambda i, j: x[i, tirx.Select(j < op.first, j, j + op.width)],
        name="out",
    )
    return _kernel([x, out], op)


def _kernel(tensors: Sequence[te.Tensor], op: Operation) -> PrimFunc:
    return marked(te.create_prim_func(list(tensors)).with_attr("tirx.noalias", True), op)
