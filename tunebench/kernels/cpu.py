"""The kernels of a decoder that are no matrix product, as TensorIR functions.

Everything but the number of positions in use is static; that number comes from `position`, one int32 in device
memory, so no length needs a kernel of its own and a recorded launch can be replayed.
Vectors of a loop's own values are buffers used in several vectorized loops: in one alone, TVM would shrink them
to the one element that the loop sees, and then vectorize around it. Arithmetic is in float32 throughout.
"""

import functools

from tvm.script import tirx as T
from tvm.tirx import Expr, PrimFunc

from tunebench.kernels import arithmetic
from tunebench.kernels.cpu_attention import LANES, append, attention, cache_dtype, cache_shapes, over_cache, vector
from tunebench.kernels.operation import Activate, LastRow, LayerNorm, RmsNorm, SiluMul
from tunebench.kernels.tvmscript import without

__all__ = ["LANES", "append", "attention", "cache_dtype", "cache_shapes", "over_cache"]


@functools.cache
def rms_norm(op: RmsNorm) -> PrimFunc:
    """(x [rows, width], weight [width]) -> x / sqrt(mean(x^2) + epsilon) * weight, as Hugging Face's llama.

    With a residual [rows, width] as third argument, that is added.
    """
    rows, width, epsilon, dtype, residual = op.rows, op.width, op.epsilon, op.dtype, op.residual
    lanes = vector(width)

    @T.prim_func(private=True, s_tir=True)
    def rms_norm(
        x: T.Buffer((rows, width), dtype),
        weight: T.Buffer((width,), dtype),
        added: T.Buffer((rows, width), dtype),
        out: T.Buffer((rows, width), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for i in range(rows):
            with T.sblock("row"):
                row = T.axis.spatial(rows, i)
                if residual:
                    T.reads(x[row, 0:width], weight[0:width], added[row, 0:width])
                else:
                    T.reads(x[row, 0:width], weight[0:width])
                T.writes(out[row, 0:width])
                squares = T.sblock_alloc_buffer((lanes,), "float32")
                total = T.sblock_alloc_buffer((1,), "float32")
                for lane in range(lanes):
                    squares[lane] = T.float32(0)
                for j, lane in T.grid(width // lanes, lanes):
                    squares[lane] = squares[lane] + T.Cast("float32", x[row, j * lanes + lane]) * T.Cast(
                        "float32", x[row, j * lanes + lane]
                    )
                total[0] = T.float32(0)
                for lane in range(lanes):
                    total[0] = total[0] + squares[lane]
                total[0] = T.rsqrt(total[0] / T.float32(width) + T.float32(epsilon))
                if residual:
                    for j in range(width):
                        out[row, j] = T.Cast(
                            dtype,
                            T.Cast("float32", added[row, j])
                            + T.Cast("float32", x[row, j]) * total[0] * T.Cast("float32", weight[j]),
                        )
                else:
                    for j in range(width):
                        out[row, j] = T.Cast(
                            dtype, T.Cast("float32", x[row, j]) * total[0] * T.Cast("float32", weight[j])
                        )

    return rms_norm if residual else without(rms_norm, 2)


@functools.cache
def layer_norm(op: LayerNorm) -> PrimFunc:
    """(x [rows, width], weight [width], bias [width]) -> (x - mean) / sqrt(variance + epsilon) * weight + bias."""
    rows, width, epsilon, dtype = op.rows, op.width, op.epsilon, op.dtype
    lanes = vector(width)

    @T.prim_func(private=True, s_tir=True)
    def layer_norm(
        x: T.Buffer((rows, width), dtype),
        weight: T.Buffer((width,), dtype),
        bias: T.Buffer((width,), dtype),
        out: T.Buffer((rows, width), dtype),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for i in range(rows):
            with T.sblock("row"):
                row = T.axis.spatial(rows, i)
                T.reads(x[row, 0:width], weight[0:width], bias[0:width])
                T.writes(out[row, 0:width])
                sums = T.sblock_alloc_buffer((lanes,), "float32")
                mean = T.sblock_alloc_buffer((1,), "float32")
                factor = T.sblock_alloc_buffer((1,), "float32")
                for lane in range(lanes):
                    sums[lane] = T.float32(0)
                for j, lane in T.grid(width // lanes, lanes):
                    sums[lane] = sums[lane] + T.Cast("float32", x[row, j * lanes + lane])
                mean[0] = T.float32(0)
                for lane in range(lanes):
                    mean[0] = mean[0] + sums[lane]
                mean[0] = mean[0] / T.float32(width)
                for lane in range(lanes):
                    sums[lane] = T.float32(0)
                for j, lane in T.grid(width // lanes, lanes):
                    sums[lane] = sums[lane] + (T.Cast("float32", x[row, j * lanes + lane]) - mean[0]) * (
                        T.Cast("float32", x[row, j * lanes + lane]) - mean[0]
                    )
                factor[0] = T.float32(0)
                for lane in range(lanes):
                    factor[0] = factor[0] + sums[lane]
                factor[0] = T.rsqrt(factor[0] / T.float32(width) + T.float32(epsilon))
                for j in range(width):
                    out[row, j] = T.Cast(
                        dtype,
                        (T.Cast("float32", x[row, j]) - mean[0]) * factor[0] * T.Cast("float32", weight[j])
                        + T.Cast("float32", bias[j]),
                    )

    return layer_norm


@functools.cache
def silu_mul(op: SiluMul) -> PrimFunc:
    """x [rows, 2 width] -> activation(first half) * second half, [rows, width]."""
    return _activated(op, gated=True)


@functools.cache
def activate(op: Activate) -> PrimFunc:
    """x [rows, width] -> activation of each element."""
    return _activated(op, gated=False)


def _activated(op: SiluMul | Activate, gated: bool) -> PrimFunc:
    rows, width, dtype, activation = op.rows, op.width, op.dtype, op.activation
    lanes, columns, by_erf = vector(width), 2 * width if gated else width, activation == "gelu"

    def result(gate: Expr, whole: Expr, part: Expr) -> Expr:
        return whole if by_erf else gate / (T.float32(1) + arithmetic.exp2(whole, part - whole))

    @T.prim_func(private=True, s_tir=True)
    def activated(x: T.Buffer((rows, columns), dtype), out: T.Buffer((rows, width), dtype)):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for i, j in T.grid(rows, width // lanes):
            with T.sblock("row"):
                row, part = T.axis.remap("SS", [i, j])
                if gated:
                    T.reads(
                        x[row, part * lanes : part * lanes + lanes],
                        x[row, width + part * lanes : width + part * lanes + lanes],
                    )
                else:
                    T.reads(x[row, part * lanes : part * lanes + lanes])
                T.writes(out[row, part * lanes : part * lanes + lanes])
                gate = T.sblock_alloc_buffer((lanes,), "float32")
                wholes = T.sblock_alloc_buffer((lanes,), "float32")
                parts = T.sblock_alloc_buffer((lanes,), "float32")
                for lane in T.vectorized(lanes):
                    gate[lane] = arithmetic.entering(activation, T.Cast("float32", x[row, part * lanes + lane]))
                if by_erf:
                    for lane in T.vectorized(lanes):
                        parts[lane] = arithmetic.inner(activation, gate[lane])
                    for lane in T.vectorized(lanes):
                        wholes[lane] = arithmetic.by_erf(gate[lane], parts[lane])
                else:
                    for lane in T.vectorized(lanes):
                        parts[lane] = arithmetic.clamp(arithmetic.inner(activation, gate[lane]), 126)
                    for lane in T.vectorized(lanes):
                        wholes[lane] = T.floor(parts[lane] + T.float32(0.5))
                if gated:
                    for lane in T.vectorized(lanes):
                        out[row, part * lanes + lane] = T.Cast(
                            dtype,
                            result(gate[lane], wholes[lane], parts[lane])
                            * arithmetic.other(activation, T.Cast("float32", x[row, width + part * lanes + lane])),
                        )
                else:
                    for lane in T.vectorized(lanes):
                        out[row, part * lanes + lane] = T.Cast(dtype, result(gate[lane], wholes[lane], parts[lane]))

    return activated


@functools.cache
def last_row(op: LastRow) -> PrimFunc:
    """(x [b, m, width], last_token: one int32) -> x[:, last_token, :]."""
    b, m, width, dtype = op.b, op.m, op.width, op.dtype

    @T.prim_func(private=True, s_tir=True)
    def last_row(
        x: T.Buffer((b, m, width), dtype), last_token: T.Buffer((1,), "int32"), out: T.Buffer((b, width), dtype)
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for ib in range(b):
            with T.sblock("row"):
                row = T.axis.spatial(b, ib)
                T.reads(x[row, 0:m, 0:width], last_token[0])
                T.writes(out[row, 0:width])
                for j in range(width):
                    out[row, j] = x[row, last_token[0], j]

    return last_row


@functools.cache
def quantize_rows(rows: int, width: int, group: int, zero: int, dtype: str) -> PrimFunc:
    """x [rows, width] -> int8 [rows, width], float32 scales and int32 offsets, both [rows, width / group].

    A group's scale is its largest magnitude / 127; its offset is -zero times the sum of its integers, what a
    product with unsigned weights of that zero point must add.
    """
    vectors = group // LANES

    @T.prim_func(private=True, s_tir=True)
    def quantize_rows(
        x: T.Buffer((rows, width), dtype),
        integers: T.Buffer((rows, width), "int8"),
        scales: T.Buffer((rows, width // group), "float32"),
        offsets: T.Buffer((rows, width // group), "int32"),
    ):
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        for i, g in T.grid(rows, width // group):
            with T.sblock("row"):
                row, part = T.axis.remap("SS", [i, g])
                T.reads(x[row, part * group : part * group + group])
                T.writes(integers[row, part * group : part * group + group], scales[row, part], offsets[row, part])
                tops = T.sblock_alloc_buffer((LANES,), "float32")
                sums = T.sblock_alloc_buffer((LANES,), "int32")
                steps = T.sblock_alloc_buffer((LANES,), "int32")
                top = T.sblock_alloc_buffer((2,), "float32")
                total = T.sblock_alloc_buffer((1,), "int32")
                for lane in T.vectorized(LANES):
                    tops[lane] = T.float32(0)
                    sums[lane] = 0
                for v in T.unroll(vectors):
                    for lane in T.vectorized(LANES):
                        tops[lane] = T.max(
                            tops[lane], T.fabs(T.Cast("float32", x[row, part * group + v * LANES + lane]))
                        )
                top[0] = T.float32(0)
                for lane in T.unroll(LANES):
                    top[0] = T.max(top[0], tops[lane])
                top[1] = T.Select(top[0] > T.float32(0), T.float32(127) / top[0], T.float32(0))
                for v in T.unroll(vectors):
                    for lane in T.vectorized(LANES):
                        steps[lane] = T.Cast(
                            "int32",
                            T.floor(
                                T.Cast("float32", x[row, part * group + v * LANES + lane]) * top[1] + T.float32(0.5)
                            ),
                        )
                    for lane in T.vectorized(LANES):
                        sums[lane] = sums[lane] + steps[lane]
                    for lane in T.vectorized(LANES):
                        integers[row, part * group + v * LANES + lane] = T.Cast("int8", steps[lane])
                total[0] = 0
                for lane in T.unroll(LANES):
                    total[0] = total[0] + sums[lane]
                scales[row, part] = top[0] / T.float32(127)
                offsets[row, part] = T.int32(-zero) * total[0]

    return quantize_rows
