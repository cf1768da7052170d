"""Symmetric integers in groups along K that share one float scale, as MLC LLM's group quantization.

A word of 32 bits holds 32 / bits weights. A weight is (integer - zero) * scale with zero = 2^(bits - 1) - 1 and
scale = max|w of the group| / zero. Layout NK stores [N, K / per word] and [N, K / group], the first weight of a
word in its lowest bits; layout KN stores the transposes. Layout N16 stores [N / 16, K / per word, 16] and
[N / 16, K / group, 16], weight p of a word at bit 8 (p mod 4) + bits (p div 4), as `dot` multiplies them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.model.quantization import RANDOM_STD, Array, Arrays, Body, Family, Shapes, float_product
from tunebench.spec import Scheme

if TYPE_CHECKING:
    from tvm import te, tirx
    from tvm.relax.frontend.nn import Tensor

WORD_BITS = 32
BYTES = 4  # of a word
TILE = 16  # outputs side by side in layout N16


def per_word(scheme: Scheme) -> int:
    """Weights in one word."""
    return WORD_BITS // scheme.weight_bits


def zero_point(scheme: Scheme) -> int:
    """The integer that stands for 0."""
    return (1 << (scheme.weight_bits - 1)) - 1


def _shift(scheme: Scheme, place: Any) -> Any:
    """The lowest bit of a weight by its place in the word, both arrays or expressions."""
    if scheme.layout == "N16":
        return place % BYTES * 8 + place // BYTES * scheme.weight_bits
    return place * scheme.weight_bits


def pack(scheme: Scheme, integers: Array) -> Array:
    """Unsigned integers [N, K] -> words [N, K / per word]."""
    count = per_word(scheme)
    lanes = integers.astype(np.uint32).reshape(integers.shape[0], -1, count)
    shifts = _shift(scheme, np.arange(count, dtype=np.uint32))
    return np.asarray(np.bitwise_or.reduce(lanes << shifts, axis=-1), np.uint32)


def unpack(scheme: Scheme, words: Array) -> Array:
    """Words [N, K / per word] -> unsigned integers [N, K]."""
    shifts = _shift(scheme, np.arange(per_word(scheme), dtype=np.uint32))
    mask = np.uint32((1 << scheme.weight_bits) - 1)
    return np.asarray((words[..., None] >> shifts) & mask).reshape(words.shape[0], -1)


def _shapes(scheme: Scheme, n: int, k: int) -> Shapes:
    def laid_out(columns: int) -> tuple[int, ...]:
        return {"NK": (n, columns), "KN": (columns, n), "N16": (n // TILE, columns, TILE)}[scheme.layout]

    words, groups = laid_out(k // per_word(scheme)), laid_out(k // scheme.group_size)
    return {"q_weight": (words, "uint32"), "q_scale": (groups, scheme.dtype)}


def _lay_out(scheme: Scheme, rows: Array) -> Array:
    """[N, columns] -> as the layout stores it."""
    if scheme.layout == "N16":
        rows = rows.reshape(-1, TILE, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.T if scheme.layout == "KN" else rows)


def by_row(scheme: Scheme, stored: Array) -> Array:
    """As the layout stores it -> [N, columns]."""
    if scheme.layout == "N16":
        return stored.swapaxes(1, 2).reshape(-1, stored.shape[1])
    return stored.T if scheme.layout == "KN" else stored


def _quantize(scheme: Scheme, matrix: Array) -> Arrays:
    n, k = matrix.shape
    zero = zero_point(scheme)
    groups = matrix.astype(np.float32).reshape(n, -1, scheme.group_size)
    scales = np.abs(groups).max(-1) / np.float32(zero)
    stored = scales.astype(scheme.dtype).astype(np.float32)[..., None]
    steps = np.divide(groups, stored, out=np.zeros_like(groups), where=stored > 0)
    integers = np.clip(np.rint(steps + zero), 0, 2 * zero).reshape(n, k)
    return {
        "q_weight": _lay_out(scheme, pack(scheme, integers)),
        "q_scale": _lay_out(scheme, scales.astype(scheme.dtype)),
    }


def _dequantize(scheme: Scheme, parts: Arrays) -> Array:
    words, scales = (by_row(scheme, parts[name]) for name in ("q_weight", "q_scale"))
    steps = unpack(scheme, words).astype(np.float32) - zero_point(scheme)
    return np.asarray(steps * np.repeat(scales.astype(np.float32), scheme.group_size, axis=1), np.float32)


def _random(scheme: Scheme, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Uniform words; scales such that the weights have the usual standard deviation."""
    parts: Arrays = {}
    for name, (shape, dtype) in _shapes(scheme, n, k).items():
        if name == "q_weight":
            parts[name] = rng.integers(0, 2**WORD_BITS, shape, np.uint32)
        else:
            spread = (2**scheme.weight_bits) / 12**0.5
            parts[name] = (rng.uniform(0.9, 1.1, shape) * RANDOM_STD / spread).astype(dtype)
    return parts


def _matmul(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    from tvm.relax.frontend.nn import op

    if scheme.activations == "int8":
        return _int8_product(scheme, x, parts, out_dtype)
    one_row = int(x.shape[0]) == 1
    body = _vector_product(scheme, out_dtype) if one_row else _matrix_product(scheme, out_dtype)
    return op.tensor_expr_op(body, f"{scheme.name}_matmul", [x, parts["q_weight"], parts["q_scale"]])


def _int8_product(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    """Quantize the activations, a scale a group, then multiply integers."""
    from tvm.relax.frontend.nn import Tensor as Placeholder
    from tvm.relax.frontend.nn import op

    from tunebench.kernels import cpu as cpu_kernels
    from tunebench.kernels import int8_dot

    m, k = (int(extent) for extent in x.shape)
    groups = (m, k // scheme.group_size)
    quantized = op.tensor_ir_op(
        cpu_kernels.quantize_rows(m, k, scheme.group_size, zero_point(scheme), x.dtype),
        "quantize_rows",
        [x],
        [
            Placeholder.placeholder((m, k), "int8", "integers"),
            Placeholder.placeholder(groups, "float32", "scales"),
            Placeholder.placeholder(groups, "int32", "offsets"),
        ],
    )
    body = int8_dot.product(scheme.weight_bits, scheme.group_size, out_dtype)
    return op.tensor_expr_op(body, f"{scheme.name}_matmul", [*quantized, parts["q_weight"], parts["q_scale"]])


def _at(scheme: Scheme, tensor: te.Tensor, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    return tensor[k, n] if scheme.layout == "KN" else tensor[n, k]


def _vector_product(scheme: Scheme, out_dtype: str) -> Body:
    """y = sum over words of scale * (sum within the word of x * integer - zero * sum of x).

    The scale and the zero point leave the inner sum, and the integers stay where they lie in the word:
    the word is only masked, and x is divided by the power of two of the place, which is exact.
    """
    from tvm import te, tirx

    count, zero, words_per_group = per_word(scheme), zero_point(scheme), scheme.group_size // per_word(scheme)

    def place(i: tirx.Expr, bits: int) -> tirx.Expr:
        return tirx.const(bits, "uint32") << (i * scheme.weight_bits).astype("uint32")

    def product(x: te.Tensor, weight: te.Tensor, scale: te.Tensor) -> te.Tensor:
        m, k = x.shape
        n = weight.shape[1 if scheme.layout == "KN" else 0]
        i, j = te.reduce_axis((0, count), name="i"), te.reduce_axis((0, count), name="j")
        word = te.reduce_axis((0, k // count), name="word")
        x_placed = te.compute(
            (m, k), lambda a, b: x[a, b].astype("float32") / place(b % count, 1).astype("float32"), name="x_placed"
        )
        x_sum = te.compute(
            (m, k // count), lambda a, b: te.sum(x[a, b * count + j].astype("float32"), axis=j), name="x_sum"
        )
        mask = (1 << scheme.weight_bits) - 1
        dot = te.compute(
            (m, n, k // count),
            lambda a, b, c: te.sum(
                x_placed[a, c * count + i] * (_at(scheme, weight, b, c) & place(i, mask)).astype("float32"), axis=i
            ),
            name="dot",
        )
        y = te.compute(
            (m, n),
            lambda a, b: te.sum(
                (dot[a, b, word] - x_sum[a, word] * float(zero))
                * _at(scheme, scale, b, word // words_per_group).astype("float32"),
                axis=word,
            ),
            name="matmul",
        )
        return y if out_dtype == "float32" else te.compute((m, n), lambda a, b: y[a, b].astype(out_dtype), name="out")

    return product


def _matrix_product(scheme: Scheme, out_dtype: str) -> Body:
    """y = x @ dequantize(weight).T; the dequantization is a stage of its own, which a schedule places."""
    from tvm import te

    def product(x: te.Tensor, weight: te.Tensor, scale: te.Tensor) -> te.Tensor:
        n = weight.shape[1 if scheme.layout == "KN" else 0]
        dequantized = te.compute((n, x.shape[1]), lambda b, c: _weight(scheme, weight, scale, b, c), name="dequantize")
        return float_product(x, dequantized, out_dtype)

    return product


def _weight(
    scheme: Scheme, weight: te.Tensor, scale: te.Tensor, n: tirx.Expr, k: tirx.Expr, dtype: str = "float32"
) -> tirx.Expr:
    from tvm import tirx

    count = per_word(scheme)
    word = _at(scheme, weight, n, k // count)
    mask = tirx.const((1 << scheme.weight_bits) - 1, "uint32")
    integer = (word >> _shift(scheme, k % count).astype("uint32")) & mask
    step = integer.astype("int32") - zero_point(scheme)
    return step.astype(dtype) * _at(scheme, scale, n, k // scheme.group_size).astype(dtype)


def _weights(scheme: Scheme, weight: te.Tensor, scale: te.Tensor) -> te.Tensor:
    """[N, K] in the scheme's dtype, as a stage of its own."""
    from tvm import te

    columns = 0 if scheme.layout == "KN" else 1
    n, k = weight.shape[1 - columns], weight.shape[columns] * per_word(scheme)
    return te.compute((n, k), lambda b, c: _weight(scheme, weight, scale, b, c, scheme.dtype), name="dequantize")


def _take(scheme: Scheme, tokens: Tensor, parts: dict[str, Tensor]) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    def rows(index: te.Tensor, weight: te.Tensor, scale: te.Tensor) -> te.Tensor:
        k = weight.shape[0 if scheme.layout == "KN" else 1] * per_word(scheme)
        return te.compute(
            (index.shape[0], k),
            lambda i, j: _weight(scheme, weight, scale, index[i], j).astype(scheme.dtype),
            name="take",
        )

    return op.tensor_expr_op(rows, f"{scheme.name}_take", [tokens, parts["q_weight"], parts["q_scale"]])


FAMILIES = (
    Family(
        name="group",
        schemes=(
            Scheme("q4f16_0", "group", "float16", 4, 32, "KN"),
            Scheme("q4f16_1", "group", "float16", 4, 32, "NK"),
            Scheme("q4f32_1", "group", "float32", 4, 32, "NK"),
            Scheme("q8f16_1", "group", "float16", 8, 32, "NK"),
            Scheme("q4i8f16_0", "group", "float16", 4, 32, "N16", "int8"),
            Scheme("q8i8f16_0", "group", "float16", 8, 32, "N16", "int8"),
        ),
        shapes=_shapes,
        quantize=_quantize,
        dequantize=_dequantize,
        random=_random,
        matmul=_matmul,
        take=_take,
        weights=_weights,
    ),
)
