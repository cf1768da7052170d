"""Integers in groups along K that share a float scale, as MLC LLM's group quantization, symmetric or not.

A word of 32 bits holds 32 / bits weights. A symmetric weight is (integer - zero) * scale with zero = 2^(bits - 1) - 1
and scale = max|w of the group| / zero. Others span a group's range: (integer - zero) * scale with a whole number `zero`
of the group, or integer * scale + minimum; both are stored beside the scale, in its type. Layout NK stores
[N, K / per word] and [N, K / group], layout KN the transposes, layout N16 [N / 16, K / per word, 16] and
[N / 16, K / group, 16], which products of bytes read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.model.quantization import RANDOM_STD, Array, Arrays, Body, Kind, Shapes, float_product
from tunebench.spec import Activations, Layout, Packing, Scheme, WeightFormat, Zero

if TYPE_CHECKING:
    from tvm import te, tirx
    from tvm.relax.frontend.nn import Tensor

BYTES = 4  # of a word
TILE = 16  # outputs side by side in layout N16
GROUP_PARTS: dict[Zero, tuple[str, ...]] = {
    "symmetric": ("q_scale",),
    "zero_point": ("q_scale", "q_zero"),
    "minimum": ("q_scale", "q_min"),
}
"""What every group has."""


def _shift(form: WeightFormat, place: Any) -> Any:
    """The lowest bit of a weight by its place in the word, both arrays or expressions."""
    return place % BYTES * 8 + place // BYTES * form.bits if form.packing == "by_byte" else place * form.bits


def pack(form: WeightFormat, integers: Array) -> Array:
    """Unsigned integers [N, K] -> words [N, K / per word]."""
    lanes = integers.astype(np.uint32).reshape(integers.shape[0], -1, form.per_word)
    shifts = _shift(form, np.arange(form.per_word, dtype=np.uint32))
    return np.asarray(np.bitwise_or.reduce(lanes << shifts, axis=-1), np.uint32)


def unpack(form: WeightFormat, words: Array) -> Array:
    """Words [N, K / per word] -> unsigned integers [N, K]."""
    shifts = _shift(form, np.arange(form.per_word, dtype=np.uint32))
    return np.asarray((words[..., None] >> shifts) & np.uint32(_largest(form))).reshape(words.shape[0], -1)


def _largest(form: WeightFormat) -> int:
    """The largest integer of so many bits."""
    return (1 << form.bits) - 1


def _shapes(form: WeightFormat, n: int, k: int) -> Shapes:
    def laid_out(columns: int) -> tuple[int, ...]:
        return {"NK": (n, columns), "KN": (columns, n), "N16": (n // TILE, columns, TILE)}[form.layout]

    groups = laid_out(k // form.group), form.dtype
    return {"q_weight": (laid_out(k // form.per_word), "uint32"), **dict.fromkeys(GROUP_PARTS[form.zero], groups)}


def _lay_out(form: WeightFormat, rows: Array) -> Array:
    """[N, columns] -> as the layout stores it."""
    if form.layout == "N16":
        rows = rows.reshape(-1, TILE, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.T if form.layout == "KN" else rows)


def by_row(form: WeightFormat, stored: Array) -> Array:
    """As the layout stores it -> [N, columns]."""
    if form.layout == "N16":
        return stored.swapaxes(1, 2).reshape(-1, stored.shape[1])
    return stored.T if form.layout == "KN" else stored


def _quantize(form: WeightFormat, matrix: Array) -> Arrays:
    groups = matrix.astype(np.float32).reshape(matrix.shape[0], -1, form.group)
    held = _of_groups(form, groups)
    steps = np.zeros_like(groups)
    np.divide(groups - held["q_min"], held["q_scale"], out=steps, where=held["q_scale"] > 0)
    most = 2 * form.zero_point if form.zero == "symmetric" else _largest(form)
    integers = np.clip(np.rint(steps + held["q_zero"]), 0, most).reshape(matrix.shape)
    stored = {name: held[name][..., 0].astype(numpy_dtype(form.dtype)) for name in GROUP_PARTS[form.zero]}
    return {name: _lay_out(form, rows) for name, rows in {"q_weight": pack(form, integers), **stored}.items()}


def _of_groups(form: WeightFormat, groups: Array) -> Arrays:
    """Scale, zero and minimum of groups [N, groups, group], float32 [N, groups, 1], as rounded as they are stored."""

    def rounded(values: Array) -> Array:
        return values.astype(numpy_dtype(form.dtype)).astype(np.float32)

    nothing = np.zeros((*groups.shape[:2], 1), np.float32)
    if form.zero == "symmetric":
        scale = np.abs(groups).max(-1, keepdims=True) / np.float32(form.zero_point)
        return {"q_scale": rounded(scale), "q_zero": nothing + form.zero_point, "q_min": nothing}
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if form.zero == "minimum":
        return {"q_scale": rounded((high - low) / _largest(form)), "q_zero": nothing, "q_min": rounded(low)}
    low, high = np.minimum(low, 0), np.maximum(high, 0)  # 0 itself is one of the integers
    scale = rounded((high - low) / _largest(form))
    zero = np.divide(-low, scale, out=nothing.copy(), where=scale > 0)
    return {"q_scale": scale, "q_zero": np.clip(np.rint(zero), 0, _largest(form)), "q_min": nothing}


def _dequantize(form: WeightFormat, parts: Arrays) -> Array:
    rows = {name: by_row(form, stored) for name, stored in parts.items()}
    steps = unpack(form, rows.pop("q_weight")).astype(np.float32)
    of_group = {name: np.repeat(held.astype(np.float32), form.group, axis=1) for name, held in rows.items()}
    if form.zero == "minimum":
        return np.asarray(steps * of_group["q_scale"] + of_group["q_min"], np.float32)
    return np.asarray((steps - of_group.get("q_zero", form.zero_point)) * of_group["q_scale"], np.float32)


def _random(form: WeightFormat, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Uniform words; scales such that the weights have the usual standard deviation, about 0."""
    shapes = _shapes(form, n, k)
    words = rng.integers(0, 2**32, shapes["q_weight"][0], np.uint32)
    scale = rng.uniform(0.9, 1.1, shapes["q_scale"][0]) * RANDOM_STD / (2**form.bits / 12**0.5)
    made = {"q_scale": scale, "q_zero": np.full_like(scale, form.zero_point), "q_min": -scale * form.zero_point}
    return {"q_weight": words, **{name: made[name].astype(numpy_dtype(form.dtype)) for name in GROUP_PARTS[form.zero]}}


def _matmul(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    from tvm.relax.frontend.nn import op

    if scheme.activations == "int8":
        return _int8_product(scheme, x, parts, out_dtype)
    form = scheme.weight
    in_place = int(x.shape[0]) == 1 and form.zero == "symmetric" and form.packing == "in_order"
    body = (_vector_product if in_place else _matrix_product)(form, out_dtype)
    return op.tensor_expr_op(body, f"{scheme.name}_matmul", [x, *parts.values()])


def _int8_product(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    """Quantize the activations, a scale a group, then multiply integers."""
    from tvm.relax.frontend.nn import Tensor as Placeholder
    from tvm.relax.frontend.nn import op

    from tunebench.kernels import cpu as cpu_kernels
    from tunebench.kernels import int8_dot

    form, (m, k) = scheme.weight, (int(extent) for extent in x.shape)
    groups = (m, k // form.group)
    quantized = op.tensor_ir_op(
        cpu_kernels.quantize_rows(m, k, form.group, form.zero_point, x.dtype),
        "quantize_rows",
        [x],
        [
            Placeholder.placeholder((m, k), "int8", "integers"),
            Placeholder.placeholder(groups, "float32", "scales"),
            Placeholder.placeholder(groups, "int32", "offsets"),
        ],
    )
    body = int8_dot.product(form, out_dtype)
    return op.tensor_expr_op(body, f"{scheme.name}_matmul", [*quantized, *parts.values()])


def _at(form: WeightFormat, tensor: te.Tensor, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    if form.layout == "N16":
        raise ValueError("tiles of 16 outputs are read by products of bytes alone")
    return tensor[k, n] if form.layout == "KN" else tensor[n, k]


def _vector_product(form: WeightFormat, out_dtype: str) -> Body:
    """y = sum over words of scale * (sum within the word of x * integer - zero * sum of x).

    The scale and the zero point leave the inner sum, and the integers stay where they lie in the word:
    the word is only masked, and x is divided by the power of two of the place, which is exact. For symmetric weights
    in order.
    """
    from tvm import te, tirx

    count, zero, words_per_group = form.per_word, form.zero_point, form.group // form.per_word

    def place(i: tirx.Expr, bits: int) -> tirx.Expr:
        return tirx.const(bits, "uint32") << (i * form.bits).astype("uint32")

    def product(x: te.Tensor, weight: te.Tensor, scale: te.Tensor) -> te.Tensor:
        m, k = x.shape
        n = weight.shape[1 if form.layout == "KN" else 0]
        i, j = te.reduce_axis((0, count), name="i"), te.reduce_axis((0, count), name="j")
        word = te.reduce_axis((0, k // count), name="word")
        x_placed = te.compute(
            (m, k), lambda a, b: x[a, b].astype("float32") / place(b % count, 1).astype("float32"), name="x_placed"
        )
        x_sum = te.compute(
            (m, k // count), lambda a, b: te.sum(x[a, b * count + j].astype("float32"), axis=j), name="x_sum"
        )
        mask = _largest(form)
        dot = te.compute(
            (m, n, k // count),
            lambda a, b, c: te.sum(
                x_placed[a, c * count + i] * (_at(form, weight, b, c) & place(i, mask)).astype("float32"), axis=i
            ),
            name="dot",
        )
        y = te.compute(
            (m, n),
            lambda a, b: te.sum(
                (dot[a, b, word] - x_sum[a, word] * float(zero))
                * _at(form, scale, b, word // words_per_group).astype("float32"),
                axis=word,
            ),
            name="matmul",
        )
        return y if out_dtype == "float32" else te.compute((m, n), lambda a, b: y[a, b].astype(out_dtype), name="out")

    return product


def _matrix_product(form: WeightFormat, out_dtype: str) -> Body:
    """y = x @ dequantize(weight).T; the dequantization is a stage of its own, which a schedule places."""
    from tvm import te

    def product(x: te.Tensor, *parts: te.Tensor) -> te.Tensor:
        n = parts[0].shape[1 if form.layout == "KN" else 0]
        dequantized = te.compute((n, x.shape[1]), lambda b, c: _weight(form, parts, b, c), name="dequantize")
        return float_product(x, dequantized, out_dtype)

    return product


def _weight(
    form: WeightFormat, parts: Sequence[te.Tensor], n: tirx.Expr, k: tirx.Expr, dtype: str = "float32"
) -> tirx.Expr:
    """One weight of the parts that `_shapes` names."""
    from tvm import tirx

    word = _at(form, parts[0], n, k // form.per_word)
    mask = tirx.const(_largest(form), "uint32")
    integer = ((word >> _shift(form, k % form.per_word).astype("uint32")) & mask).astype("int32")
    scale, *more = (_at(form, part, n, k // form.group).astype(dtype) for part in parts[1:])
    if form.zero == "symmetric":
        return (integer - form.zero_point).astype(dtype) * scale
    if form.zero == "zero_point":
        return (integer.astype(dtype) - more[0]) * scale
    return integer.astype(dtype) * scale + more[0]


def _weights(form: WeightFormat, *parts: te.Tensor) -> te.Tensor:
    """[N, K] in the scales' dtype, as a stage of its own."""
    from tvm import te

    columns = 0 if form.layout == "KN" else 1
    n, k = parts[0].shape[1 - columns], parts[0].shape[columns] * form.per_word
    return te.compute((n, k), lambda b, c: _weight(form, parts, b, c, form.dtype), name="dequantize")


def _take(scheme: Scheme, tokens: Tensor, parts: dict[str, Tensor]) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    form = scheme.weight

    def rows(index: te.Tensor, *parts: te.Tensor) -> te.Tensor:
        k = parts[0].shape[0 if form.layout == "KN" else 1] * form.per_word
        return te.compute(
            (index.shape[0], k),
            lambda i, j: _weight(form, parts, index[i], j).astype(scheme.dtype),
            name="take",
        )

    return op.tensor_expr_op(rows, f"{scheme.name}_take", [tokens, *parts.values()])


def _grouped(name: str, bits: int, dtype: str, layout: Layout = "NK", activations: Activations = "float") -> Scheme:
    """A symmetric scheme with groups of 32 and scales of the activations' type."""
    packing: Packing = "by_byte" if layout == "N16" else "in_order"
    return Scheme(name, WeightFormat("integer", bits, dtype, 32, "symmetric", layout, packing), dtype, activations)


KINDS = (
    Kind(
        name="integer",
        schemes=(
            _grouped("q4f16_0", 4, "float16", "KN"),
            _grouped("q4f16_1", 4, "float16"),
            _grouped("q4f32_1", 4, "float32"),
            _grouped("q8f16_1", 8, "float16"),
            _grouped("q4i8f16_0", 4, "float16", "N16", "int8"),
            _grouped("q8i8f16_0", 8, "float16", "N16", "int8"),
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
