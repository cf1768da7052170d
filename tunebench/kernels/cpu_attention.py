"""Attention and its cache on a CPU, as TensorIR functions.

Shapes: b sequences, m tokens of a chunk, H query heads over G key/value heads of D elements, a cache of C positions.
Keys lie in blocks of LANES positions, [b, G, C / LANES, D, LANES], so that a vector of scores reads one contiguous
vector of keys for each d; values lie as [b, G, C, D]. A quantized cache has scales beside it, float32 [2, b, G, C], of
keys and of values.
"""

import functools
from collections.abc import Callable

import tvm_ffi
from tvm.script import tirx as T
from tvm.tirx import Buffer, BufferRegion, Expr, PrimFunc

from tunebench.kernels.arithmetic import KV_MOST, LOG2_E, TANH_MOST, clamp, exp2, from_code, tanh, to_code
from tunebench.kernels.gpu import marked
from tunebench.kernels.operation import Append, Attention, OverCache
from tunebench.kernels.tvmscript import quick_parsing, without

LANES = 16
MASKED = -1e30
ATTENTION_TILE = 16  # tokens at most that share a pass over the cache


def vector(width: int) -> int:
    """The most lanes that divide a width."""
    return max(size for size in range(1, LANES + 1) if width % size == 0)


def cache_shapes(
    b: int, kv_heads: int, context: int, dim: int, kv: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One layer's keys, in blocks of LANES positions side by side, and values."""
    return (b, kv_heads, context // LANES, dim, LANES), (b, kv_heads, context, dim)


def cache_dtype(kv: str, dtype: str) -> str:
    """The element type of a cache: `dtype` of one that is not quantized."""
    return {"int8": "int8", "fp8": "uint8"}.get(kv, dtype)


@functools.cache
def attention(op: Attention) -> PrimFunc:
    """Causal attention of m new tokens at `position` over the cache: (q, keys, values, position[, sinks][, scales]) ->
    out.

    A row takes the tokens of a tile of one head: their scores with every key from the first in its window up to the
    last one's, the softmax, and the sum of values. The products are blocks of their own, which a schedule arranges.
    """
    b, m, heads, kv_heads, dim, context, dtype = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context, op.dtype
    share = heads // kv_heads
    scale, softcap, window, sinks = op.scaled, op.softcap, op.window, op.sinks
    capped, kv, quantized, stored = softcap > 0, op.kv, op.kv != "", cache_dtype(op.kv, dtype)
    blocks = context // LANES
    tile = max(size for size in range(1, ATTENTION_TILE + 1) if m % size == 0)
    held = min(blocks, (window + tile - 3) // LANES + 2) if window else blocks  # that a tile may see

    def first(position: Buffer, row: Expr) -> Expr | int:
        return T.max(position[0] + row * tile - (window - 1), 0) // LANES if window else 0

    def count(position: Buffer, row: Expr) -> Expr:
        return (position[0] + row * tile + tile - 1) // LANES + 1 - first(position, row)

    def sees(at: Expr, other: Expr) -> Expr:
        return T.And(other <= at, other > at - window) if window else other <= at

    unused = [4] * (not sinks) + [5] * (not quantized)

    def more(*given: BufferRegion) -> list[BufferRegion]:
        return [each for place, each in zip((4, 5), given, strict=True) if place not in unused]

    def held_in(cache: Expr) -> Expr:
        return from_code(kv, cache) if quantized else T.Cast("float32", cache)

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q: T.Buffer((b, m, heads, dim), dtype),
        keys: T.Buffer((b, kv_heads, blocks, dim, LANES), stored),
        values: T.Buffer((b, kv_heads, context, dim), stored),
        position: T.Buffer((1,), "int32"),
        sink: T.Buffer((heads,), "float32"),
        scales: T.Buffer((2, b, kv_heads, context), "float32"),
        out: T.Buffer((b, m, heads, dim), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib, ih, it in T.grid(b, heads, m // tile):
            with T.sblock("row"):
                vb, vh, vt = T.axis.remap("SSS", [ib, ih, it])
                T.reads(
                    q[vb, vt * tile : vt * tile + tile, vh, 0:dim],
                    keys[vb, vh // share, 0:blocks, 0:dim, 0:LANES],
                    values[vb, vh // share, 0:context, 0:dim],
                    position[0],
                    *more(sink[vh], scales[0:2, vb, vh // share, 0:context]),
                )
                T.writes(out[vb, vt * tile : vt * tile + tile, vh, 0:dim])
                query = T.sblock_alloc_buffer((tile, dim), "float32")
                score = T.sblock_alloc_buffer((held, tile, LANES), "float32")
                total = T.sblock_alloc_buffer((tile, dim), "float32")
                tops = T.sblock_alloc_buffer((LANES,), "float32")
                sums = T.sblock_alloc_buffer((LANES,), "float32")
                norms = T.sblock_alloc_buffer((tile,), "float32")
                for r, d in T.grid(tile, dim):
                    query[r, d] = T.Cast("float32", q[vb, vt * tile + r, vh, d]) * T.float32(scale)
                for k, r, lane, d in T.grid(count(position, vt), tile, LANES, dim):
                    with T.sblock("scores"):
                        vk, vr, vl, vd = T.axis.remap("SSSR", [k, r, lane, d])
                        with T.init():
                            score[vk, vr, vl] = T.float32(0)
                        score[vk, vr, vl] = score[vk, vr, vl] + query[vr, vd] * held_in(
                            keys[vb, vh // share, first(position, vt) + vk, vd, vl]
                        )
                wholes = T.sblock_alloc_buffer((LANES,), "float32")
                parts = T.sblock_alloc_buffer((LANES,), "float32")
                for r in range(tile):
                    for lane in T.vectorized(LANES):
                        tops[lane] = T.float32(MASKED)
                        sums[lane] = T.float32(0)
                    for k in T.serial(count(position, vt)):
                        if quantized:
                            for lane in T.vectorized(LANES):
                                score[k, r, lane] = (
                                    score[k, r, lane]
                                    * scales[0, vb, vh // share, (first(position, vt) + k) * LANES + lane]
                                )
                        if capped:
                            for lane in T.vectorized(LANES):
                                parts[lane] = clamp(score[k, r, lane] * T.float32(1 / softcap), TANH_MOST)
                            for lane in T.vectorized(LANES):
                                score[k, r, lane] = T.float32(softcap) * tanh(parts[lane])
                        for lane in T.vectorized(LANES):
                            score[k, r, lane] = T.Select(
                                sees(position[0] + vt * tile + r, (first(position, vt) + k) * LANES + lane),
                                score[k, r, lane],
                                T.float32(MASKED),
                            )
                            tops[lane] = T.max(tops[lane], score[k, r, lane])
                    if sinks:
                        norms[r] = sink[vh]
                    else:
                        norms[r] = T.float32(MASKED)
                    for lane in T.unroll(LANES):
                        norms[r] = T.max(norms[r], tops[lane])
                    for k in T.serial(count(position, vt)):
                        for lane in T.vectorized(LANES):
                            parts[lane] = T.max((score[k, r, lane] - norms[r]) * T.float32(LOG2_E), T.float32(-126))
                        for lane in T.vectorized(LANES):
                            wholes[lane] = T.floor(parts[lane] + T.float32(0.5))
                        for lane in T.vectorized(LANES):
                            score[k, r, lane] = exp2(wholes[lane], parts[lane] - wholes[lane])
                        for lane in T.vectorized(LANES):
                            sums[lane] = sums[lane] + score[k, r, lane]
                        if quantized:
                            for lane in T.vectorized(LANES):
                                score[k, r, lane] = (
                                    score[k, r, lane]
                                    * scales[1, vb, vh // share, (first(position, vt) + k) * LANES + lane]
                                )
                    if sinks:
                        norms[r] = T.exp2((sink[vh] - norms[r]) * T.float32(LOG2_E))
                    else:
                        norms[r] = T.float32(0)
                    for lane in T.unroll(LANES):
                        norms[r] = norms[r] + sums[lane]
                for k, lane, r, d in T.grid(count(position, vt), LANES, tile, dim):
                    with T.sblock("mix"):
                        vk, vl, vr, vd = T.axis.remap("RRSS", [k, lane, r, d])
                        with T.init():
                            total[vr, vd] = T.float32(0)
                        total[vr, vd] = total[vr, vd] + score[vk, vr, vl] * held_in(
                            values[vb, vh // share, (first(position, vt) + vk) * LANES + vl, vd]
                        )
                for r, d in T.grid(tile, dim):
                    out[vb, vt * tile + r, vh, d] = T.Cast(dtype, total[r, d] / norms[r])

    return _said(without(attention, *unused), op)


def _said(func: PrimFunc, op: OverCache) -> PrimFunc:
    """The kernel, which says what it is where `over_cache` cannot tell: beyond the plain operation."""
    return marked(func, op) if op.extras() else func


@functools.cache
def append(op: Append) -> PrimFunc:
    """Rotate a chunk's queries and keys and write its keys and values into the cache, in place.

    (qkv [b, m, H + 2G, D], position, rope_cos_sin [2, C, R / 2] = cosines and sines[, weights [D] of the queries' and
    of the keys' norm], keys, values[, scales]) -> q, with the rotation that pairs element d of the first R with
    d + R / 2, as Hugging Face's llama does.
    """
    b, m, heads, kv_heads, dim, context, dtype = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context, op.dtype
    rotated, half, rest, epsilon = op.rotated, op.rotated // 2, op.dim - op.rotated, op.norm
    normed, partial, kv, quantized = op.norm > 0, rest > 0, op.kv, op.kv != ""
    blocks, lanes, stored = context // LANES, vector(dim), cache_dtype(op.kv, dtype)
    unused = [3, 4] * (not normed) + [7] * (not quantized)

    made, most = ("float32", KV_MOST[kv]) if quantized else (dtype, 0.0)

    def place(sequence: Expr, h: Expr, at: Expr, d: Expr) -> tuple[Expr, ...]:
        return (h, d) if quantized else (sequence, h, at // LANES, d, at % LANES)

    def norms(*given: BufferRegion) -> tuple[BufferRegion, ...]:
        return given if normed else ()

    def scaled(*given: BufferRegion) -> tuple[BufferRegion, ...]:
        return given if quantized else ()

    def element(qkv: Buffer, factors: Buffer, weight: Buffer, *at: Expr) -> Expr:
        x = T.Cast("float32", qkv[at])
        return x * factors[at[2]] * T.Cast("float32", weight[at[3]]) if normed else x

    @T.prim_func(private=True, s_tir=True)
    def append(
        qkv: T.Buffer((b, m, heads + 2 * kv_heads, dim), dtype),
        position: T.Buffer((1,), "int32"),
        rope_cos_sin: T.Buffer((2, context, half), "float32"),
        query_norm: T.Buffer((dim,), dtype),
        key_norm: T.Buffer((dim,), dtype),
        keys: T.Buffer((b, kv_heads, blocks, dim, LANES), stored),
        values: T.Buffer((b, kv_heads, context, dim), stored),
        scales: T.Buffer((2, b, kv_heads, context), "float32"),
        q: T.Buffer((b, m, heads, dim), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib, im in T.grid(b, m):
            with T.sblock("row"):
                vb, vm = T.axis.remap("SS", [ib, im])
                T.reads(
                    qkv[vb, vm, 0 : heads + 2 * kv_heads, 0:dim],
                    position[0],
                    rope_cos_sin[0:2, 0:context, 0:half],
                    *norms(query_norm[0:dim], key_norm[0:dim]),
                )
                T.writes(
                    keys[vb, 0:kv_heads, 0:blocks, 0:dim, 0:LANES],
                    values[vb, 0:kv_heads, 0:context, 0:dim],
                    *scaled(scales[0:2, vb, 0:kv_heads, 0:context]),
                    q[vb, vm, 0:heads, 0:dim],
                )
                if normed:
                    squares = T.sblock_alloc_buffer((lanes,), "float32")
                    factors = T.sblock_alloc_buffer((heads + kv_heads,), "float32")
                    for h in range(heads + kv_heads):
                        for lane in range(lanes):
                            squares[lane] = T.float32(0)
                        for j, lane in T.grid(dim // lanes, lanes):
                            squares[lane] = squares[lane] + T.Cast(
                                "float32", qkv[vb, vm, h, j * lanes + lane]
                            ) * T.Cast("float32", qkv[vb, vm, h, j * lanes + lane])
                        factors[h] = T.float32(0)
                        for lane in range(lanes):
                            factors[h] = factors[h] + squares[lane]
                        factors[h] = T.rsqrt(factors[h] / T.float32(dim) + T.float32(epsilon))
                else:
                    factors = query_norm  # in whose place it is not read
                for h, d in T.grid(heads, half):
                    q[vb, vm, h, d] = T.Cast(
                        dtype,
                        element(qkv, factors, query_norm, vb, vm, h, d) * rope_cos_sin[0, position[0] + vm, d]
                        - element(qkv, factors, query_norm, vb, vm, h, d + half) * rope_cos_sin[1, position[0] + vm, d],
                    )
                    q[vb, vm, h, d + half] = T.Cast(
                        dtype,
                        element(qkv, factors, query_norm, vb, vm, h, d + half) * rope_cos_sin[0, position[0] + vm, d]
                        + element(qkv, factors, query_norm, vb, vm, h, d) * rope_cos_sin[1, position[0] + vm, d],
                    )
                turned = T.sblock_alloc_buffer((kv_heads, dim), "float32") if quantized else keys
                for h, d in T.grid(kv_heads, half):
                    turned[place(vb, h, position[0] + vm, d)] = T.Cast(
                        made,
                        element(qkv, factors, key_norm, vb, vm, h + heads, d) * rope_cos_sin[0, position[0] + vm, d]
                        - element(qkv, factors, key_norm, vb, vm, h + heads, d + half)
                        * rope_cos_sin[1, position[0] + vm, d],
                    )
                    turned[place(vb, h, position[0] + vm, d + half)] = T.Cast(
                        made,
                        element(qkv, factors, key_norm, vb, vm, h + heads, d + half)
                        * rope_cos_sin[0, position[0] + vm, d]
                        + element(qkv, factors, key_norm, vb, vm, h + heads, d) * rope_cos_sin[1, position[0] + vm, d],
                    )
                if partial:
                    for h, d in T.grid(heads, rest):
                        q[vb, vm, h, d + rotated] = T.Cast(
                            dtype, element(qkv, factors, query_norm, vb, vm, h, d + rotated)
                        )
                    for h, d in T.grid(kv_heads, rest):
                        turned[place(vb, h, position[0] + vm, d + rotated)] = T.Cast(
                            made, element(qkv, factors, key_norm, vb, vm, h + heads, d + rotated)
                        )
                if quantized:
                    top = T.sblock_alloc_buffer((2,), "float32")
                    for h in range(kv_heads):
                        top[0] = T.float32(0)
                        top[1] = T.float32(0)
                        for d in range(dim):
                            top[0] = T.max(top[0], T.fabs(turned[h, d]))
                            top[1] = T.max(top[1], T.fabs(T.Cast("float32", qkv[vb, vm, h + heads + kv_heads, d])))
                        for i in range(2):
                            scales[i, vb, h, position[0] + vm] = top[i] / T.float32(most)
                            top[i] = T.Select(top[i] > T.float32(0), T.float32(most) / top[i], T.float32(0))
                        for d in range(dim):
                            keys[vb, h, (position[0] + vm) // LANES, d, (position[0] + vm) % LANES] = T.Cast(
                                stored, to_code(kv, turned[h, d] * top[0])
                            )
                        for d in range(dim):
                            values[vb, h, position[0] + vm, d] = T.Cast(
                                stored, to_code(kv, T.Cast("float32", qkv[vb, vm, h + heads + kv_heads, d]) * top[1])
                            )
                else:
                    for h, d in T.grid(kv_heads, dim):
                        values[vb, h, position[0] + vm, d] = qkv[vb, vm, h + heads + kv_heads, d]

    return _said(without(append, *unused), op)


def over_cache(func: PrimFunc) -> OverCache | None:
    """What `attention` or `append` was made for, as read from its arguments; None for any other kernel."""
    shapes = [tuple(int(extent) for extent in param.shape) for param in func.params if hasattr(param, "shape")]
    first, last, dtype = shapes[0], shapes[-1], str(func.params[0].dtype)
    ranks = [len(shape) for shape in shapes]
    make: Callable[..., PrimFunc]
    kind: type[OverCache]
    if ranks == [4, 5, 4, 1, 4]:
        (_, kv_heads, context, _), make, kind = shapes[2], attention, Attention
    elif ranks == [4, 1, 3, 5, 4, 4]:
        (_, kv_heads, context, _), make, kind = shapes[4], append, Append
    else:
        return None
    found = kind(first[0], first[1], last[2], kv_heads, first[3], context, dtype)
    with quick_parsing():
        same = tvm_ffi.structural_equal(func.body, make(found).body, map_free_vars=True)
    return found if same else None
