"""Integers in groups along K that share a scale, symmetric or not.

A matrix is these parts, in this order, each where its format has it; [N, ...] in layout NK, padded to whole groups:

- `q_weight` uint32 [N, K / per word]: 32 / bits weights a word, the first lowest. Of 3 bits ten, in whole groups. Of
  planes, the lower four bits of each weight.
- `q_high` uint32 [N, K / 32] or [N, K / 16]: the upper bit of 5, or the two of 6, in the same way.
- `q_scale` of the format's dtype [N, K / group]; where there are super groups int8, or uint8 beside a
  minimum.
- `q_zero`, a whole number, or `q_min`, as the scale.
- `q_super` of the format's dtype [N, K / super group]: times `q_scale`, it is the group's scale.
- `q_super_min` likewise: times `q_min`, it is the group's minimum. (ggml's Q4_K subtracts: this is minus its dmin.)
- `q_order` int32 [K]: the input that each stored column multiplies.

An integer q is worth (q - zero) * scale or, with a minimum, q * scale + minimum, computed in float32 in this order.
Layout KN stores the transposes, layout N16 [N / 16, columns, 16], padded with zeros, which products of bytes read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.model import rounding
from tunebench.model.quantization import (
    ORDER,
    RANDOM_STD,
    Array,
    Arrays,
    Body,
    Kind,
    Shapes,
    by_rows,
    float_product,
    in_order,
)
from tunebench.spec import WHOLE_ROW, Activations, Layout, Packing, Scheme, WeightFormat, Zero

if TYPE_CHECKING:
    from tvm import te, tirx
    from tvm.relax.frontend.nn import Tensor

BYTES = 4  # of a word
TILE = 16  # outputs side by side in layout N16
SUPER_INTEGERS = {"symmetric": ("int8", 127), "minimum": ("uint8", 63)}
"""Of what type, and how large at most, a group's scale in a super group is: as ggml's Q6_K and Q4_K have it."""
GROUP_PARTS: dict[Zero, tuple[str, ...]] = {
    "symmetric": ("q_scale",),
    "zero_point": ("q_scale", "q_zero"),
    "minimum": ("q_scale", "q_min"),
}
"""What every group has."""
SUPER_PARTS = {"q_scale": "q_super", "q_min": "q_super_min"}
"""What multiplies it, where there are super groups."""


def shift_of(form: WeightFormat, place: Any) -> Any:
    """The lowest bit of a weight by its place in the word, both arrays or expressions."""
    return place % BYTES * 8 + place // BYTES * form.bits if form.packing == "by_byte" else place * form.bits


def _largest(form: WeightFormat) -> int:
    """The largest integer of so many bits."""
    return (1 << form.bits) - 1


def pack(form: WeightFormat, integers: Array) -> Array:
    """Unsigned integers [N, K], of the format's bits -> words [N, K / per word], filled up with zeros."""
    count = 32 // form.bits
    lanes = np.pad(integers.astype(np.uint32), ((0, 0), (0, -integers.shape[1] % count)))
    shifts = shift_of(form, np.arange(count, dtype=np.uint32))
    return np.asarray(np.bitwise_or.reduce(lanes.reshape(lanes.shape[0], -1, count) << shifts, axis=-1), np.uint32)


def unpack(form: WeightFormat, words: Array) -> Array:
    """Words [N, K / per word] -> unsigned integers [N, K]."""
    shifts = shift_of(form, np.arange(32 // form.bits, dtype=np.uint32))
    return np.asarray((words[..., None] >> shifts) & np.uint32(_largest(form))).reshape(words.shape[0], -1)


def planes_of(form: WeightFormat) -> dict[str, tuple[int, WeightFormat]]:
    """The parts that hold the integers: the lowest bit that each has of them, and how it holds those."""
    by_byte = form.packing == "by_byte" or (form.packing == "planes" and form.layout == "N16")
    low = replace(form, bits=form.low_bits, packing="by_byte" if by_byte else "in_order")
    if form.packing != "planes":
        return {"q_weight": (0, low)}
    return {"q_weight": (0, low), "q_high": (form.low_bits, replace(low, bits=form.bits - form.low_bits))}


def packed(form: WeightFormat, integers: Array) -> Arrays:
    """Unsigned integers [N, K] -> the words of every plane, by row."""
    planes = planes_of(form).items()
    return {name: pack(plane, integers.astype(np.uint32) >> first & _largest(plane)) for name, (first, plane) in planes}


def unpacked(form: WeightFormat, rows: Arrays) -> Array:
    """Parts by row -> unsigned integers, uint32 [N, K]."""
    planes = [unpack(plane, rows[name]) << np.uint32(first) for name, (first, plane) in planes_of(form).items()]
    shortest = min(plane.shape[1] for plane in planes)  # the others may be filled up further
    return np.asarray(np.bitwise_or.reduce([plane[:, :shortest] for plane in planes]))


def _columns(form: WeightFormat, k: int) -> dict[str, tuple[int, str]]:
    """How many columns each part has, and its dtype."""
    group = form.group_of(k)
    groups = -(-k // group)
    planes = {name: (-(-groups * group // plane.per_word), "uint32") for name, (_, plane) in planes_of(form).items()}
    dtype = SUPER_INTEGERS[form.zero][0] if form.super_group else form.dtype
    of_group = dict.fromkeys(GROUP_PARTS[form.zero], (groups, dtype))
    supers = [SUPER_PARTS[name] for name in of_group] if form.super_group else []
    return {**planes, **of_group, **dict.fromkeys(supers, (-(-k // (form.super_group or 1)), form.dtype))}


def _shapes(form: WeightFormat, n: int, k: int) -> Shapes:
    def laid_out(columns: int) -> tuple[int, ...]:
        return {"NK": (n, columns), "KN": (columns, n), "N16": (-(-n // TILE), columns, TILE)}[form.layout]

    order: Shapes = {ORDER: ((k,), "int32")} if form.ordered else {}
    return {name: (laid_out(count), dtype) for name, (count, dtype) in _columns(form, k).items()} | order


def _lay_out(form: WeightFormat, rows: Array) -> Array:
    """[N, columns] -> as the layout stores it."""
    if form.layout == "N16":
        rows = np.pad(rows, ((0, -rows.shape[0] % TILE), (0, 0)))
        rows = rows.reshape(-1, TILE, rows.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(rows.T if form.layout == "KN" else rows)


def by_row(form: WeightFormat, stored: Array) -> Array:
    """As the layout stores it -> [N, columns], with the rows that pad it."""
    if form.layout == "N16":
        return stored.swapaxes(1, 2).reshape(-1, stored.shape[1])
    return stored.T if form.layout == "KN" else stored


def _laid_out(form: WeightFormat, parts: Arrays) -> Arrays:
    """Parts in layout NK, as `by_rows` says, -> in the format's own; no value changes."""
    words = packed(form, unpacked(by_rows(form), parts)) if form.layout == "N16" else {}
    return {name: part if name == ORDER else _lay_out(form, part) for name, part in {**parts, **words}.items()}


def _quantize(form: WeightFormat, matrix: Array, importance: Array | None = None) -> Arrays:
    k = matrix.shape[1]
    matrix, weights, order = matrix.astype(np.float32), importance, {}
    if form.ordered:  # the most important first
        order[ORDER] = np.argsort(np.zeros(k) if weights is None else -weights, kind="stable").astype(np.int32)
        matrix, weights = matrix[:, order[ORDER]], None if weights is None else weights[order[ORDER]]
    group = form.group_of(k)
    padded = np.pad(matrix, ((0, 0), (0, -k % group)), mode="edge")
    if weights is not None:
        weights = np.pad(weights.astype(np.float32), (0, -k % group)).reshape(1, -1, group)

    def some(rows: Array) -> Arrays:
        return _quantized(form, rows.reshape(rows.shape[0], -1, group), weights)

    return _laid_out(form, {**rounding.in_blocks(some, padded), **order})


def _quantized(form: WeightFormat, groups: Array, weights: Array | None) -> Arrays:
    """Groups [N, groups, group] -> parts in layout NK."""
    most = _largest(form)
    if form.zero == "symmetric":
        fitted = rounding.symmetric(groups, form.zero_point, most, weights)
    elif form.zero == "zero_point":
        fitted = rounding.with_zero(groups, most, weights)
    else:
        fitted = rounding.with_minimum(groups, most, weights, below_zero=bool(form.super_group))
    found = {"q_scale": fitted.scale[..., 0], "q_zero": fitted.zero[..., 0], "q_min": fitted.minimum[..., 0]}
    stored: Arrays = {}
    for name in GROUP_PARTS[form.zero]:
        stored |= _stored(form, name, found[name])
    scale, zero, minimum = (each[..., None] for each in _of_groups(form, stored))
    steps = np.zeros_like(groups)
    np.divide(groups - minimum, scale, out=steps, where=scale != 0)
    integers = np.clip(np.rint(steps + zero), 0, most).reshape(groups.shape[0], -1)
    parts = {**packed(by_rows(form), integers), **stored}
    return {name: parts[name] for name in _columns(form, integers.shape[1])}


def _stored(form: WeightFormat, name: str, values: Array) -> Arrays:
    """What every group has, float32 [N, groups], as it is stored: rounded, or as an integer and its super group's."""
    dtype = numpy_dtype(form.dtype)
    if not form.super_group:
        return {name: values.astype(dtype)}
    n, count = values.shape
    in_super = form.super_group // form.group
    supers = np.pad(values, ((0, 0), (0, -count % in_super))).reshape(n, -1, in_super)
    extreme = np.take_along_axis(supers, np.abs(supers).argmax(-1)[..., None], -1)[..., 0]
    integer, most = SUPER_INTEGERS[form.zero]
    shared = (extreme / np.float32(most)).astype(dtype)
    per_group = np.repeat(shared.astype(np.float32), in_super, axis=1)[:, :count]
    steps = np.divide(values, per_group, out=np.zeros_like(values), where=per_group != 0)
    return {
        name: np.clip(np.rint(steps), most - 255 if integer == "int8" else 0, most).astype(integer),
        SUPER_PARTS[name]: shared,
    }


def _of_groups(form: WeightFormat, parts: Arrays) -> tuple[Array, Array, Array]:
    """Scale, zero and minimum of each group, float32 [N, groups], of parts by row."""

    def of(name: str) -> Array:
        values = parts[name].astype(np.float32)
        if not form.super_group:
            return values
        shared = parts[SUPER_PARTS[name]].astype(np.float32)
        return np.asarray(np.repeat(shared, form.super_group // form.group, axis=1)[:, : values.shape[1]] * values)

    scale = of("q_scale")
    nothing = np.zeros_like(scale)
    zero = nothing + np.float32(form.zero_point) if form.zero == "symmetric" else nothing
    return (
        scale,
        of("q_zero") if form.zero == "zero_point" else zero,
        of("q_min") if form.zero == "minimum" else nothing,
    )


def _dequantize(form: WeightFormat, parts: Arrays) -> Array:
    rows = {name: by_row(form, part) for name, part in parts.items() if name != ORDER}
    steps = unpacked(form, rows).astype(np.float32)
    per_group = form.group if form.group != WHOLE_ROW else steps.shape[1]
    steps = steps[:, : rows["q_scale"].shape[1] * per_group]
    scale, zero, minimum = (np.repeat(each, per_group, axis=1) for each in _of_groups(form, rows))
    found = steps * scale + minimum if form.zero == "minimum" else (steps - zero) * scale
    if form.ordered:
        found = found[:, np.argsort(parts[ORDER])]
    return np.asarray(found, np.float32)


def _random(form: WeightFormat, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Uniform words; scales such that the weights have the usual standard deviation, about 0."""
    shapes = _shapes(form, n, k)
    made: Arrays = {name: rng.integers(0, 2**32, shapes[name][0], np.uint32) for name in planes_of(form)}
    scale = rng.uniform(0.9, 1.1, shapes["q_scale"][0]) * RANDOM_STD / (2**form.bits / 12**0.5)
    made |= {"q_scale": scale, "q_zero": np.full_like(scale, form.zero_point), "q_min": -scale * form.zero_point}
    if form.super_group:
        middle = SUPER_INTEGERS[form.zero][1] // 2
        made |= {"q_super": np.full(shapes["q_super"][0], scale.mean() / middle)}
        made |= {"q_super_min": -made["q_super"] * form.zero_point}
        made |= {"q_scale": np.rint(scale / scale.mean() * middle)}
        made |= {"q_min": made["q_scale"]}
    made |= {ORDER: rng.permutation(k)} if form.ordered else {}
    return {name: made[name].astype(numpy_dtype(dtype)) for name, (_, dtype) in shapes.items()}


def _matmul(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    from tvm.relax.frontend.nn import op

    x, parts = in_order(scheme.weight, x, parts)
    if scheme.activations != "float":
        return _int8_product(scheme, x, parts, out_dtype)
    body = _vector_product if _stays_in_words(scheme.weight, *map(int, x.shape)) else _matrix_product
    return op.tensor_expr_op(
        body(scheme.weight, out_dtype, tuple(parts)), f"{scheme.name}_matmul", [x, *parts.values()]
    )


def _stays_in_words(form: WeightFormat, m: int, k: int) -> bool:
    """Whether the kernel for one row, which leaves the integers in their words, is for such weights."""
    group = form.group_of(k)
    return m == 1 and form.packing == "in_order" and k % group == 0 and group % form.per_word == 0


def _int8_product(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    """Quantize the activations, a scale a group or a token, then multiply integers."""
    from tvm.relax.frontend.nn import Tensor as Placeholder
    from tvm.relax.frontend.nn import op

    from tunebench.kernels import cpu as cpu_kernels
    from tunebench.kernels import int8_dot

    form, (m, k) = scheme.weight, (int(extent) for extent in x.shape)
    group = form.byte_group
    factor = form.zero_point if form.zero == "symmetric" else -1  # of the integers' sums, which others need as they are
    per_token = scheme.activations == "int8_token"
    quantize = cpu_kernels.quantize_tokens if per_token else cpu_kernels.quantize_rows
    quantized = op.tensor_ir_op(
        quantize(m, k, group, factor, x.dtype),
        quantize.__name__,
        [x],
        [
            Placeholder.placeholder((m, k), "int8", "integers"),
            Placeholder.placeholder((m, 1 if per_token else k // group), "float32", "scales"),
            Placeholder.placeholder((m, k // group), "int32", "offsets"),
        ],
    )
    body = int8_dot.product(form, out_dtype, tuple(parts))
    return op.tensor_expr_op(body, f"{scheme.name}_matmul", [*quantized, *parts.values()])


def _vector_product(form: WeightFormat, out_dtype: str, names: tuple[str, ...]) -> Body:
    """y = sum over words of scale * (sum within the word of x * integer - zero * sum of x).

    The scale, the zero point and the minimum leave the inner sum, and the integers stay where they lie in the word:
    the word is only masked, and x is divided by the power of two of the place, which is exact. For weights in order.
    """
    from tvm import te, tirx

    from tunebench.kernels.dequantize import at

    count = form.per_word

    def place(i: tirx.Expr, bits: int) -> tirx.Expr:
        return tirx.const(bits, "uint32") << (i * form.bits).astype("uint32")

    def product(x: te.Tensor, *parts: te.Tensor) -> te.Tensor:
        m, k = x.shape
        weight, words_per_group = parts[0], form.group_of(int(k)) // count
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
                x_placed[a, c * count + i] * (at(form, weight, b, c) & place(i, mask)).astype("float32"), axis=i
            ),
            name="dot",
        )
        held = _of_group_stages(form, dict(zip(names, parts, strict=True)))

        def of_word(name: str, b: tirx.Expr) -> tirx.Expr:
            return at(form, held[name], b, word // words_per_group).astype("float32")

        def scaled(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
            if form.zero == "minimum":
                return dot[a, b, word] * of_word("q_scale", b) + x_sum[a, word] * of_word("q_min", b)
            zero = of_word("q_zero", b) if form.zero == "zero_point" else float(form.zero_point)
            return (dot[a, b, word] - x_sum[a, word] * zero) * of_word("q_scale", b)

        y = te.compute((m, n), lambda a, b: te.sum(scaled(a, b), axis=word), name="matmul")
        return y if out_dtype == "float32" else te.compute((m, n), lambda a, b: y[a, b].astype(out_dtype), name="out")

    return product


def _of_group_stages(form: WeightFormat, parts: dict[str, te.Tensor]) -> dict[str, te.Tensor]:
    """What every group has; where there are super groups, as stages `group_scale` and `group_min` in float32."""
    from tvm import te

    from tunebench.kernels.dequantize import at

    if not form.super_group:
        return parts
    in_super = form.super_group // form.group

    def whole(name: str) -> te.Tensor:
        held, shared = parts[name], parts[SUPER_PARTS[name]]
        return te.compute(
            held.shape,
            lambda n, g: held[n, g].astype("float32") * at(form, shared, n, g // in_super).astype("float32"),
            name=name.replace("q_", "group_"),
        )

    return {name: whole(name) for name in GROUP_PARTS[form.zero]}


def _matrix_product(form: WeightFormat, out_dtype: str, names: tuple[str, ...]) -> Body:
    """y = x @ dequantize(weight).T; the dequantization is a stage of its own, which a schedule places."""
    from tvm import te

    from tunebench.kernels import dequantize

    def product(x: te.Tensor, *parts: te.Tensor) -> te.Tensor:
        n, held = parts[0].shape[1 if form.layout == "KN" else 0], dict(zip(names, parts, strict=True))
        dequantized = te.compute(
            (n, x.shape[1]),
            lambda b, c: dequantize.integer(form, held, b, c),
            name="dequantize",
            attrs=dequantize.lacks(form, int(x.shape[0])),
        )
        return float_product(x, dequantized, out_dtype)

    return product


def _weights(form: WeightFormat, *parts: te.Tensor) -> te.Tensor:
    """[N, K] in the scales' dtype, as a stage of its own, K as it is padded."""
    from tvm import te

    from tunebench.kernels import dequantize

    columns = 0 if form.layout == "KN" else 1
    n, k = parts[0].shape[1 - columns], parts[0].shape[columns] * form.per_word
    held = dict(zip(_columns(form, int(k)), parts, strict=True))
    return te.compute((n, k), lambda b, c: dequantize.integer(form, held, b, c, form.dtype), name="dequantize")


def _take(scheme: Scheme, tokens: Tensor, parts: dict[str, Tensor]) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    from tunebench.kernels import dequantize

    form, names = scheme.weight, tuple(parts)

    def rows(index: te.Tensor, *parts: te.Tensor) -> te.Tensor:
        k, held = parts[0].shape[0 if form.layout == "KN" else 1] * form.per_word, dict(zip(names, parts, strict=True))
        return te.compute(
            (index.shape[0], k),
            lambda i, j: dequantize.integer(form, held, index[i], j).astype(scheme.dtype),
            name="take",
        )

    return op.tensor_expr_op(rows, f"{scheme.name}_take", [tokens, *parts.values()])


def _grouped(
    name: str,
    bits: int,
    dtype: str,
    layout: Layout = "NK",
    activations: Activations = "float",
    group: int = 32,
    zero: Zero = "symmetric",
    full_range: bool = False,
    super_group: int = 0,
) -> Scheme:
    """A scheme whose scales are of the activations' type."""
    packing: Packing = "planes" if bits in (5, 6) else "by_byte" if layout == "N16" else "in_order"
    form = WeightFormat("integer", bits, dtype, group, zero, layout, packing, full_range, super_group)
    return Scheme(name, form, dtype, activations)


GGML: dict[str, dict[str, Any]] = {
    "q4_0": {"bits": 4, "full_range": True},
    "q4_1": {"bits": 4, "zero": "minimum"},
    "q5_0": {"bits": 5, "full_range": True},
    "q8_0": {"bits": 8, "full_range": True},
    "q4_k": {"bits": 4, "zero": "minimum", "super_group": 256},
    "q6_k": {"bits": 6, "group": 16, "full_range": True, "super_group": 256},
}
"""llama.cpp's types of weights, each a scheme with float activations and one with int8 activations."""

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
            _grouped("q3f16_1", 3, "float16", group=40),
            _grouped("w4a16", 4, "float16", group=128, full_range=True),
            _grouped("w4a16_asym", 4, "float16", group=128, zero="zero_point"),
            _grouped("w8a8", 8, "float16", "N16", "int8_token", WHOLE_ROW, full_range=True),
            *(_grouped(f"{name}f16", dtype="float16", **form) for name, form in GGML.items()),
            *(
                _grouped(f"{name}i8f16", dtype="float16", layout="N16", activations="int8", **form)
                for name, form in GGML.items()
            ),
        ),
        shapes=_shapes,
        quantize=_quantize,
        dequantize=_dequantize,
        laid_out=_laid_out,
        random=_random,
        matmul=_matmul,
        take=_take,
        weights=_weights,
    ),
)
