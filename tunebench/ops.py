"""The kernels of a decoder that are no matrix product, as TensorIR functions.

Shapes: b sequences, m tokens of a piece, H query heads over G key/value heads of D elements, a cache of C
positions. Everything but the number of positions in use is static; that number comes from `position`,
one int32 in device memory, so no length needs a kernel of its own and a recorded launch can be replayed.
Keys lie in blocks of LANES positions, [b, G, C / LANES, D, LANES], so that a vector of scores reads one
contiguous vector of keys for each d; values lie as [b, G, C, D]. Arithmetic is in float32 throughout.
"""

import functools

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

LANES = 16
MASKED = -1e30


@functools.cache
def attention(b: int, m: int, heads: int, kv_heads: int, dim: int, context: int, dtype: str) -> PrimFunc:
    """Causal attention of m new tokens at `position` over the cache: (q, keys, values, position) -> out."""
    share = heads // kv_heads
    scale = dim**-0.5
    blocks = context // LANES

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q: T.Buffer((b, m, heads, dim), dtype),
        keys: T.Buffer((b, kv_heads, blocks, dim, LANES), dtype),
        values: T.Buffer((b, kv_heads, context, dim), dtype),
        position: T.Buffer((1,), "int32"),
        out: T.Buffer((b, m, heads, dim), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib, ih, im in T.grid(b, heads, m):
            with T.sblock("row"):
                vb, vh, vm = T.axis.remap("SSS", [ib, ih, im])
                T.reads(
                    q[vb, vm, vh, 0:dim],
                    keys[vb, vh // share, 0:blocks, 0:dim, 0:LANES],
                    values[vb, vh // share, 0:context, 0:dim],
                    position[0],
                )
                T.writes(out[vb, vm, vh, 0:dim])
                scores = T.sblock_alloc_buffer((blocks, LANES), "float32")
                total = T.sblock_alloc_buffer((dim,), "float32")
                tops = T.sblock_alloc_buffer((LANES,), "float32")
                sums = T.sblock_alloc_buffer((LANES,), "float32")
                top = T.sblock_alloc_buffer((1,), "float32")
                norm = T.sblock_alloc_buffer((1,), "float32")
                for lane in range(LANES):
                    tops[lane] = T.float32(MASKED)
                    sums[lane] = T.float32(0)
                for block in T.serial((position[0] + vm) // LANES + 1):
                    for lane in range(LANES):
                        scores[block, lane] = T.float32(0)
                    for d in range(dim):
                        for lane in range(LANES):
                            scores[block, lane] = scores[block, lane] + T.Cast("float32", q[vb, vm, vh, d]) * T.Cast(
                                "float32", keys[vb, vh // share, block, d, lane]
                            )
                    for lane in range(LANES):
                        scores[block, lane] = T.Select(
                            block * LANES + lane <= position[0] + vm,
                            scores[block, lane] * T.float32(scale),
                            T.float32(MASKED),
                        )
                        tops[lane] = T.max(tops[lane], scores[block, lane])
                top[0] = T.float32(MASKED)
                for lane in range(LANES):
                    top[0] = T.max(top[0], tops[lane])
                for block in T.serial((position[0] + vm) // LANES + 1):
                    for lane in range(LANES):
                        scores[block, lane] = T.exp(scores[block, lane] - top[0])
                        sums[lane] = sums[lane] + scores[block, lane]
                norm[0] = T.float32(0)
                for lane in range(LANES):
                    norm[0] = norm[0] + sums[lane]
                for d in range(dim):
                    total[d] = T.float32(0)
                for t in T.serial(position[0] + vm + 1):
                    for d in range(dim):
                        total[d] = total[d] + scores[t // LANES, t % LANES] * T.Cast(
                            "float32", values[vb, vh // share, t, d]
                        )
                for d in range(dim):
                    out[vb, vm, vh, d] = T.Cast(dtype, total[d] / norm[0])

    return attention


@functools.cache
def append(b: int, m: int, heads: int, kv_heads: int, dim: int, context: int, dtype: str) -> PrimFunc:
    """Rotate a piece's queries and keys and write its keys and values into the cache, in place.

    (qkv [b, m, H + 2G, D], position, angles [2, C, D / 2] = cosines and sines, keys, values) -> q, with the
    rotation that pairs element d with d + D / 2, as Hugging Face's llama does.
    """
    half = dim // 2
    blocks = context // LANES

    @T.prim_func(private=True, s_tir=True)
    def append(
        qkv: T.Buffer((b, m, heads + 2 * kv_heads, dim), dtype),
        position: T.Buffer((1,), "int32"),
        angles: T.Buffer((2, context, half), "float32"),
        keys: T.Buffer((b, kv_heads, blocks, dim, LANES), dtype),
        values: T.Buffer((b, kv_heads, context, dim), dtype),
        q: T.Buffer((b, m, heads, dim), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib, im in T.grid(b, m):
            with T.sblock("row"):
                vb, vm = T.axis.remap("SS", [ib, im])
                T.reads(qkv[vb, vm, 0 : heads + 2 * kv_heads, 0:dim], position[0], angles[0:2, 0:context, 0:half])
                T.writes(
                    keys[vb, 0:kv_heads, 0:blocks, 0:dim, 0:LANES],
                    values[vb, 0:kv_heads, 0:context, 0:dim],
                    q[vb, vm, 0:heads, 0:dim],
                )
                for h, d in T.grid(heads, half):
                    q[vb, vm, h, d] = T.Cast(
                        dtype,
                        T.Cast("float32", qkv[vb, vm, h, d]) * angles[0, position[0] + vm, d]
                        - T.Cast("float32", qkv[vb, vm, h, d + half]) * angles[1, position[0] + vm, d],
                    )
                    q[vb, vm, h, d + half] = T.Cast(
                        dtype,
                        T.Cast("float32", qkv[vb, vm, h, d + half]) * angles[0, position[0] + vm, d]
                        + T.Cast("float32", qkv[vb, vm, h, d]) * angles[1, position[0] + vm, d],
                    )
                for h, d in T.grid(kv_heads, half):
                    keys[vb, h, (position[0] + vm) // LANES, d, (position[0] + vm) % LANES] = T.Cast(
                        dtype,
                        T.Cast("float32", qkv[vb, vm, h + heads, d]) * angles[0, position[0] + vm, d]
                        - T.Cast("float32", qkv[vb, vm, h + heads, d + half]) * angles[1, position[0] + vm, d],
                    )
                    keys[vb, h, (position[0] + vm) // LANES, d + half, (position[0] + vm) % LANES] = T.Cast(
                        dtype,
                        T.Cast("float32", qkv[vb, vm, h + heads, d + half]) * angles[0, position[0] + vm, d]
                        + T.Cast("float32", qkv[vb, vm, h + heads, d]) * angles[1, position[0] + vm, d],
                    )
                for h, d in T.grid(kv_heads, dim):
                    values[vb, h, position[0] + vm, d] = qkv[vb, vm, h + heads + kv_heads, d]

    return append


@functools.cache
def rms_norm(rows: int, width: int, epsilon: float, dtype: str) -> PrimFunc:
    """(x [rows, width], weight [width]) -> x / sqrt(mean(x^2) + epsilon) * weight, as Hugging Face's llama."""

    @T.prim_func(private=True, s_tir=True)
    def rms_norm(
        x: T.Buffer((rows, width), dtype), weight: T.Buffer((width,), dtype), out: T.Buffer((rows, width), dtype)
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for i in range(rows):
            with T.sblock("row"):
                row = T.axis.spatial(rows, i)
                T.reads(x[row, 0:width], weight[0:width])
                T.writes(out[row, 0:width])
                squares = T.sblock_alloc_buffer((LANES,), "float32")
                total = T.sblock_alloc_buffer((1,), "float32")
                for lane in range(LANES):
                    squares[lane] = T.float32(0)
                for j, lane in T.grid(width // LANES, LANES):
                    squares[lane] = squares[lane] + T.Cast("float32", x[row, j * LANES + lane]) * T.Cast(
                        "float32", x[row, j * LANES + lane]
                    )
                total[0] = T.float32(0)
                for lane in range(LANES):
                    total[0] = total[0] + squares[lane]
                total[0] = T.rsqrt(total[0] / T.float32(width) + T.float32(epsilon))
                for j in range(width):
                    out[row, j] = T.Cast(dtype, T.Cast("float32", x[row, j]) * total[0] * T.Cast("float32", weight[j]))

    return rms_norm


@functools.cache
def last_row(b: int, m: int, width: int, dtype: str) -> PrimFunc:
    """(x [b, m, width], last: one int32) -> x[:, last, :]."""

    @T.prim_func(private=True, s_tir=True)
    def last_row(x: T.Buffer((b, m, width), dtype), last: T.Buffer((1,), "int32"), out: T.Buffer((b, width), dtype)):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib in range(b):
            with T.sblock("row"):
                row = T.axis.spatial(b, ib)
                T.reads(x[row, 0:m, 0:width], last[0])
                T.writes(out[row, 0:width])
                for j in range(width):
                    out[row, j] = x[row, last[0], j]

    return last_row
