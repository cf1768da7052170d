"""What a decoder's kernels compute on a GPU, in plain form, and under what name a template may replace them.

Each is the mathematics as loops that any schedule can take, DLight's first of all. The attribute `OP` says which
operation it is; a template builds the same operation another way. Names, arguments and results are those of
`cpu`, but for the cache: keys lie as values do, [b, G, C, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor
from tvm.relax.frontend.nn import op as frontend
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tunebench.kernels import arithmetic
from tunebench.kernels.arithmetic import KV_MOST, LOG2_E, from_code, to_code
from tunebench.kernels.operation import (
    Activate,
    Activation,
    Append,
    Attention,
    LastRow,
    LayerNorm,
    Matmul,
    Operation,
    RmsNorm,
    SiluMul,
    parse,
)
from tunebench.kernels.tvmscript import quick_parsing, without
from tunebench.spec import WeightFormat

OP = "tunebench.op"


def marked(func: PrimFunc, operation: Operation) -> PrimFunc:
    """The kernel with the operation that it is."""
    func = func.without_attr("global_symbol") if "global_symbol" in func.attrs else func
    return func.with_attr("op_pattern", 8).with_attr(OP, operation.text())


def operation(func: PrimFunc) -> Operation | None:
    """What `marked` said; None for other kernels."""
    return parse(str(func.attrs[OP])) if func.attrs and OP in func.attrs else None


def cache_shapes(
    b: int, kv_heads: int, context: int, dim: int, kv: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One layer's keys and values; four of a quantized cache share a word, as not every API has bytes."""
    shape = b, kv_heads, context, dim // 4 if kv else dim
    return shape, shape


def cache_dtype(kv: str, dtype: str) -> str:
    """The element type of a cache: `dtype` of one that is not quantized."""
    return "uint32" if kv else dtype


def _kernel(tensors: Sequence[te.Tensor], operation: Operation) -> PrimFunc:
    return marked(te.create_prim_func(list(tensors)).with_attr("tirx.noalias", True), operation)


def matmul(
    x: Tensor,
    parts: dict[str, Tensor],
    dequantize: Callable[..., te.Tensor],
    n: int,
    weight: WeightFormat,
    out_dtype: str,
    residual: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [M, K] @ w [N, K].T (+ bias [N]) (+ residual [M, N]), summed in float32.

    `dequantize` makes te's [N, K] of the placeholders of `parts`, which are stored as `weight` says.
    """
    m, k = (int(extent) for extent in x.shape)
    a = te.placeholder((m, k), x.dtype, name="x")
    stores = [te.placeholder([int(e) for e in part.shape], part.dtype, name=name) for name, part in parts.items()]
    offsets = [te.placeholder((n,), bias.dtype, name="bias")] if bias is not None else []
    extra = [te.placeholder((m, n), residual.dtype, name="residual")] if residual is not None else []
    w = dequantize(*stores)
    axis = te.reduce_axis((0, k), name="k")
    sums = te.compute(
        (m, n),
        lambda i, j: te.sum(a[i, axis].astype("float32") * w[j, axis].astype("float32"), axis=axis),
        name="matmul",
    )
    y = sums
    if offsets or extra:

        def whole(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            added = [*(each[j] for each in offsets), *(each[i, j] for each in extra)]
            return sum((each.astype("float32") for each in added), sums[i, j]).astype(out_dtype)

        y = te.compute((m, n), whole, name="out")
    elif out_dtype != "float32":
        y = te.compute((m, n), lambda i, j: sums[i, j].astype(out_dtype), name="out")
    computed = Matmul(m, n, k, out_dtype, bool(extra), x.dtype, weight, bias=bool(offsets))
    func = _kernel([a, *stores, *offsets, *extra, y], computed)
    given = [x, *parts.values(), *(each for each in (bias, residual) if each is not None)]
    return frontend.tensor_ir_op(
        func, f"matmul_{weight.bits}bit_{m}x{n}x{k}", given, Tensor.placeholder((m, n), out_dtype, "y")
    )


@functools.cache
def attention(op: Attention) -> PrimFunc:
    """(q [b, m, H, D], keys, values, position[, sinks][, scales]) -> each token's mix of values up to its position."""
    b, m, heads, kv_heads, dim, context, dtype = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context, op.dtype
    q = te.placeholder((b, m, heads, dim), dtype, name="q")
    stored, held = cache_dtype(op.kv, dtype), cache_shapes(b, kv_heads, context, dim, op.kv)
    keys = te.placeholder(held[0], stored, name="keys")
    values = te.placeholder(held[1], stored, name="values")
    position = te.placeholder((1,), "int32", name="position")
    sinks = [te.placeholder((heads,), "float32", name="sinks")] if op.sinks else []
    scales = [te.placeholder((2, b, kv_heads, context), "float32", name="scales")] if op.kv else []
    rep = heads // kv_heads

    def scaled(x: tirx.Expr, which: int, *at: tirx.Expr) -> tirx.Expr:
        return x * scales[0][(which, *at)] if scales else x

    d = te.reduce_axis((0, dim), name="d")
    scores = te.compute(
        (b, heads, m, context),
        lambda ib, h, i, t: te.sum(q[ib, i, h, d].astype("float32") * _held(op.kv, keys, ib, h // rep, t, d), axis=d),
        name="scores",
    )
    seen = te.compute(
        (b, heads, m, context),
        lambda ib, h, i, t: tirx.Select(
            _sees(op, position[0] + i, t),
            _in_log2(op, scaled(scores[ib, h, i, t], 0, ib, h // rep, t)),
            tirx.const(-1e30, "float32"),
        ),
        name="seen",
    )
    t1, t2, t3 = (te.reduce_axis((0, context), name="t") for _ in range(3))
    top = te.compute((b, heads, m), lambda ib, h, i: te.max(seen[ib, h, i, t1], axis=t1), name="top")

    def highest(ib: tirx.Var, h: tirx.Var, i: tirx.Var) -> tirx.Expr:
        return tirx.max(top[ib, h, i], _log2(sinks[0][h])) if sinks else top[ib, h, i]

    weight = te.compute(
        (b, heads, m, context), lambda ib, h, i, t: tirx.exp2(seen[ib, h, i, t] - highest(ib, h, i)), name="weight"
    )
    total = te.compute((b, heads, m), lambda ib, h, i: te.sum(weight[ib, h, i, t2], axis=t2), name="total")

    def whole(ib: tirx.Var, h: tirx.Var, i: tirx.Var) -> tirx.Expr:
        return total[ib, h, i] + tirx.exp2(_log2(sinks[0][h]) - highest(ib, h, i)) if sinks else total[ib, h, i]

    mix = te.compute(
        (b, m, heads, dim),
        lambda ib, i, h, e: te.sum(
            scaled(weight[ib, h, i, t3], 1, ib, h // rep, t3) * _held(op.kv, values, ib, h // rep, t3, e), axis=t3
        ),
        name="mix",
    )
    out = te.compute(
        (b, m, heads, dim), lambda ib, i, h, e: (mix[ib, i, h, e] / whole(ib, h, i)).astype(dtype), name="out"
    )
    return _kernel([q, keys, values, position, *sinks, *scales, out], op)


def _held(kv: str, cache: te.Tensor, *at: tirx.Expr) -> tirx.Expr:
    """An element of the cache, less its scale where it is quantized."""
    if not kv:
        return cache[at].astype("float32")
    word, bit = cache[(*at[:-1], at[-1] // 4)], (at[-1] % 4 * 8).astype("uint32")
    if kv == "int8":
        return from_code(kv, tirx.reinterpret("int32", word << (tirx.const(24, "uint32") - bit)) >> 24)
    return from_code(kv, word >> bit)


def _sees(op: Attention, at: tirx.Expr, other: tirx.Expr) -> tirx.Expr:
    """Whether the token at a position sees the other."""
    return tirx.And(other <= at, other > at - op.window) if op.window else other <= at


def _in_log2(op: Attention, product: tirx.Expr) -> tirx.Expr:
    """The score of a product of a query with a key, as a power of two."""
    if not op.softcap:
        return product * tirx.const(LOG2_E * op.scaled, "float32")
    part = arithmetic.clamp(product * tirx.const(op.scaled / op.softcap, "float32"), arithmetic.TANH_MOST)
    return arithmetic.tanh(part) * tirx.const(LOG2_E * op.softcap, "float32")


def _log2(sink: tirx.Expr) -> tirx.Expr:
    return sink * tirx.const(LOG2_E, "float32")


@functools.cache
def append(op: Append) -> PrimFunc:
    """Rotate a chunk's queries and keys and write its keys and values into the cache, in place.

    (qkv [b, m, H + 2G, D], position, rope_cos_sin [2, C, R / 2] = cosines and sines[, weights [D] of the queries' and
    of the keys' norm], keys, values[, scales]) -> q, with the rotation that pairs element d of the first R with
    d + R / 2, as Hugging Face's llama does.
    """
    b, m, heads, kv_heads, dim, context, dtype = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context, op.dtype
    rotated, half, normed, partial = op.rotated, op.rotated // 2, op.norm > 0, op.rotated < dim
    every, epsilon, kv, quantized = heads + 2 * kv_heads, op.norm, op.kv, op.kv != ""
    stored, (held, _) = cache_dtype(kv, dtype), cache_shapes(b, kv_heads, context, dim, kv)
    unused = [3, 4] * (not normed) + [7] * (not quantized)

    def element(qkv: tirx.Buffer, squares: tirx.Buffer, weight: tirx.Buffer, *at: tirx.Expr) -> tirx.Expr:
        x = T.Cast("float32", qkv[at])
        if not normed:
            return x
        factor = T.rsqrt(squares[at[:-1]] / T.float32(dim) + T.float32(epsilon))
        return x * factor * T.Cast("float32", weight[at[-1]])

    def turned(x: tirx.Expr, other: tirx.Expr, cosine: tirx.Expr, sine: tirx.Expr, d: tirx.Expr) -> tirx.Expr:
        found = x * cosine + other * sine * T.Select(d < half, T.float32(-1), T.float32(1))
        return T.Select(d < rotated, found, x) if partial else found

    def word(stacked: tirx.Buffer, tops: tirx.Buffer, *at: tirx.Expr) -> tirx.Expr:
        """Four elements of a head, in a word of the cache."""
        top = tops[at[:-1]]
        factor = T.Select(top > T.float32(0), T.float32(KV_MOST[kv]) / top, T.float32(0))
        codes = [to_code(kv, stacked[(*at[:-1], at[-1] * 4 + i)] * factor).astype("uint32") for i in range(4)]
        low, *others = [code & tirx.const(0xFF, "uint32") for code in codes]
        return functools.reduce(lambda made, each: made | (each[1] << (8 * each[0])), enumerate(others, 1), low)

    with quick_parsing():

        @T.prim_func(private=True, s_tir=True)
        def append(
            qkv: T.Buffer((b, m, every, dim), dtype),
            position: T.Buffer((1,), "int32"),
            rope_cos_sin: T.Buffer((2, context, half), "float32"),
            query_norm: T.Buffer((dim,), dtype),
            key_norm: T.Buffer((dim,), dtype),
            keys: T.Buffer(held, stored),
            values: T.Buffer(held, stored),
            scales: T.Buffer((2, b, kv_heads, context), "float32"),
            q: T.Buffer((b, m, heads, dim), dtype),
        ):
            T.func_attr({"tirx.noalias": True})
            if normed:
                squares = T.sblock_alloc_buffer((b, m, every if quantized else heads + kv_heads), "float32")
                for ib, im, ih, id in T.grid(b, m, every if quantized else heads + kv_heads, dim):
                    with T.sblock("squares"):
                        vb, vm, vh, vd = T.axis.remap("SSSR", [ib, im, ih, id])
                        with T.init():
                            squares[vb, vm, vh] = T.float32(0)
                        squares[vb, vm, vh] = squares[vb, vm, vh] + T.Cast("float32", qkv[vb, vm, vh, vd]) * T.Cast(
                            "float32", qkv[vb, vm, vh, vd]
                        )
            else:
                squares = qkv  # in whose place it is not read
            for ib, im, ih, id in T.grid(b, m, heads, dim):
                with T.sblock("query"):
                    vb, vm, vh, vd = T.axis.remap("SSSS", [ib, im, ih, id])
                    q[vb, vm, vh, vd] = T.Cast(
                        dtype,
                        turned(
                            element(qkv, squares, query_norm, vb, vm, vh, vd),
                            element(qkv, squares, query_norm, vb, vm, vh, (vd + half) % rotated),
                            rope_cos_sin[0, position[0] + vm, vd % half],
                            rope_cos_sin[1, position[0] + vm, vd % half],
                            vd,
                        ),
                    )
            if quantized:
                stacked = T.sblock_alloc_buffer((b, m, 2 * kv_heads, dim), "float32")  # keys, then values
                tops = T.sblock_alloc_buffer((b, m, 2 * kv_heads), "float32")
                for ib, im, ih, id in T.grid(b, m, 2 * kv_heads, dim):
                    with T.sblock("stacked"):
                        vb, vm, vh, vd = T.axis.remap("SSSS", [ib, im, ih, id])
                        stacked[vb, vm, vh, vd] = T.Select(
                            vh < kv_heads,
                            turned(
                                element(qkv, squares, key_norm, vb, vm, heads + vh, vd),
                                element(qkv, squares, key_norm, vb, vm, heads + vh, (vd + half) % rotated),
                                rope_cos_sin[0, position[0] + vm, vd % half],
                                rope_cos_sin[1, position[0] + vm, vd % half],
                                vd,
                            ),
                            T.Cast("float32", qkv[vb, vm, heads + vh, vd]),
                        )
                for ib, im, ih, id in T.grid(b, m, 2 * kv_heads, dim):
                    with T.sblock("tops"):
                        vb, vm, vh, vd = T.axis.remap("SSSR", [ib, im, ih, id])
                        with T.init():
                            tops[vb, vm, vh] = T.float32(0)
                        tops[vb, vm, vh] = T.max(tops[vb, vm, vh], T.fabs(stacked[vb, vm, vh, vd]))
                for i, ib, im, ih in T.grid(2, b, m, kv_heads):
                    with T.sblock("scale"):
                        vi, vb, vm, vh = T.axis.remap("SSSS", [i, ib, im, ih])
                        scales[vi, vb, vh, position[0] + vm] = tops[vb, vm, vi * kv_heads + vh] / T.float32(KV_MOST[kv])
                for ib, im, ih, iw in T.grid(b, m, kv_heads, dim // 4):
                    with T.sblock("key"):
                        vb, vm, vh, vw = T.axis.remap("SSSS", [ib, im, ih, iw])
                        keys[vb, vh, position[0] + vm, vw] = word(stacked, tops, vb, vm, vh, vw)
                for ib, im, ih, iw in T.grid(b, m, kv_heads, dim // 4):
                    with T.sblock("value"):
                        vb, vm, vh, vw = T.axis.remap("SSSS", [ib, im, ih, iw])
                        values[vb, vh, position[0] + vm, vw] = word(stacked, tops, vb, vm, kv_heads + vh, vw)
            else:
                for ib, im, ih, id in T.grid(b, m, kv_heads, dim):
                    with T.sblock("key"):
                        vb, vm, vh, vd = T.axis.remap("SSSS", [ib, im, ih, id])
                        keys[vb, vh, position[0] + vm, vd] = T.Cast(
                            dtype,
                            turned(
                                element(qkv, squares, key_norm, vb, vm, heads + vh, vd),
                                element(qkv, squares, key_norm, vb, vm, heads + vh, (vd + half) % rotated),
                                rope_cos_sin[0, position[0] + vm, vd % half],
                                rope_cos_sin[1, position[0] + vm, vd % half],
                                vd,
                            ),
                        )
                for ib, im, ih, id in T.grid(b, m, kv_heads, dim):
                    with T.sblock("value"):
                        vb, vm, vh, vd = T.axis.remap("SSSS", [ib, im, ih, id])
                        values[vb, vh, position[0] + vm, vd] = qkv[vb, vm, heads + kv_heads + vh, vd]

    return marked(without(append, *unused), op)


@functools.cache
def rms_norm(op: RmsNorm) -> PrimFunc:
    """(x [rows, width], weight [width]) -> x / sqrt(mean(x^2) + epsilon) * weight, as Hugging Face's llama.

    With a residual [rows, width] as third argument, that is added.
    """
    rows, width, epsilon, dtype = op.rows, op.width, op.epsilon, op.dtype
    x = te.placeholder((rows, width), dtype, name="x")
    weight = te.placeholder((width,), dtype, name="weight")
    residual = [te.placeholder((rows, width), dtype, name="residual")] if op.residual else []
    k = te.reduce_axis((0, width), name="k")
    squares = te.compute(
        (rows,), lambda i: te.sum(x[i, k].astype("float32") * x[i, k].astype("float32"), axis=k), name="squares"
    )

    def normed(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        y = (
            x[i, j].astype("float32")
            * tirx.rsqrt(squares[i] / tirx.const(width, "float32") + tirx.const(epsilon, "float32"))
            * weight[j].astype("float32")
        )
        return sum((each[i, j].astype("float32") for each in residual), y).astype(dtype)

    return _kernel([x, weight, *residual, te.compute((rows, width), normed, name="out")], op)


@functools.cache
def layer_norm(op: LayerNorm) -> PrimFunc:
    """(x [rows, width], weight [width], bias [width]) -> (x - mean) / sqrt(variance + epsilon) * weight + bias."""
    rows, width, epsilon, dtype = op.rows, op.width, op.epsilon, op.dtype
    x = te.placeholder((rows, width), dtype, name="x")
    weight, bias = (te.placeholder((width,), dtype, name=name) for name in ("weight", "bias"))
    k1, k2 = (te.reduce_axis((0, width), name="k") for _ in range(2))
    total = te.compute((rows,), lambda i: te.sum(x[i, k1].astype("float32"), axis=k1), name="total")

    def less_mean(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
        return x[i, j].astype("float32") - total[i] / tirx.const(width, "float32")

    squares = te.compute(
        (rows,), lambda i: te.sum(less_mean(i, k2.var) * less_mean(i, k2.var), axis=k2), name="squares"
    )
    out = te.compute(
        (rows, width),
        lambda i, j: (
            less_mean(i, j)
            * tirx.rsqrt(squares[i] / tirx.const(width, "float32") + tirx.const(epsilon, "float32"))
            * weight[j].astype("float32")
            + bias[j].astype("float32")
        ).astype(dtype),
        name="out",
    )
    return _kernel([x, weight, bias, out], op)


@functools.cache
def silu_mul(op: SiluMul) -> PrimFunc:
    """x [rows, 2 width] -> activation(first half) * second half, [rows, width]."""
    rows, width, dtype, activation = op.rows, op.width, op.dtype, op.activation
    x = te.placeholder((rows, 2 * width), dtype, name="x")
    out = te.compute(
        (rows, width),
        lambda i, j: (
            _activated(activation, x[i, j].astype("float32"))
            * arithmetic.other(activation, x[i, width + j].astype("float32"))
        ).astype(dtype),
        name="out",
    )
    return _kernel([x, out], op)


@functools.cache
def activate(op: Activate) -> PrimFunc:
    """x [rows, width] -> activation of each element."""
    x = te.placeholder((op.rows, op.width), op.dtype, name="x")
    out = te.compute(
        (op.rows, op.width),
        lambda i, j: _activated(op.activation, x[i, j].astype("float32")).astype(op.dtype),
        name="out",
    )
    return _kernel([x, out], op)


def _activated(activation: Activation, x: tirx.Expr) -> tirx.Expr:
    gate = arithmetic.entering(activation, x)
    inner = arithmetic.inner(activation, gate)
    if activation == "gelu":
        return arithmetic.by_erf(gate, inner)
    return gate / (tirx.const(1, "float32") + tirx.exp2(inner))


@functools.cache
def last_row(op: LastRow) -> PrimFunc:
    """(x [b, m, width], last_token: one int32) -> x[:, last_token, :]."""
    b, m, width, dtype = op.b, op.m, op.width, op.dtype
    x = te.placeholder((b, m, width), dtype, name="x")
    last_token = te.placeholder((1,), "int32", name="last_token")
    out = te.compute((b, width), lambda i, j: x[i, last_token[0], j], name="out")
    return _kernel([x, last_token, out], op)
