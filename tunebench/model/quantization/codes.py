"""Small floats, of 8 or 4 bits, that share a scale: fp8, MXFP4, NVFP4.

A matrix is these parts, in this order, in layout NK:

- `q_weight` uint32 [N, K / per word]: codes, four or eight a word, the first lowest; padded to whole groups.
- `q_scale` [N / rows, K / group], of the format's dtype, floats of 8 bits as uint8: one scale for `group` weights of
  `rows` outputs; [N, 1] where a scale is an output's, or the whole matrix's, repeated.
- `q_super` float32 [N, 1], where the format has super groups, which are whole rows: it divides the group's scale.

A weight is code * scale, or code * (scale / super), in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.model import rounding
from tunebench.model.quantization import (
    RANDOM_STD,
    Array,
    Arrays,
    Kind,
    Shapes,
    float_product,
    in_order,
    integer,
)
from tunebench.spec import WHOLE_ROW, Scheme, WeightFormat

if TYPE_CHECKING:
    from tvm import te
    from tvm.relax.frontend.nn import Tensor

FP4, FP8, POWER = "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu"
POOL = 1 << 22  # weights that are made up, before they repeat
STEPS = {8: (1.0,), 4: (1.0, 0.67, 0.8, 0.9, 1.2, 1.5)}
"""By bits, scales that are tried, as parts of the one at which the largest weight is the largest code."""


def _most(name: str) -> float:
    """The largest number of a type of ml_dtypes."""
    return float(ml_dtypes.finfo(numpy_dtype(name)).max)


def _in_bytes(dtype: str) -> str:
    """What holds a scale: devices know no floats of 8 bits."""
    return "uint8" if numpy_dtype(dtype).itemsize == 1 else dtype


def _shapes(form: WeightFormat, n: int, k: int) -> Shapes:
    group = form.group_of(k)
    groups = -(-k // group)
    shapes: Shapes = {
        "q_weight": ((n, -(-groups * group // form.per_word)), "uint32"),
        "q_scale": ((-(-n // form.rows), groups), _in_bytes(form.dtype)),
    }
    return {**shapes, "q_super": ((n, 1), "float32")} if form.super_group else shapes


def _laid_out(form: WeightFormat, parts: Arrays) -> Arrays:
    """There is one layout; scales of a byte may come in their own type."""
    scale = parts["q_scale"]
    return {**parts, "q_scale": scale.view(np.uint8) if scale.dtype.itemsize == 1 else scale}


def decoded(codes: Array, name: str) -> Array:
    """Unsigned integers -> float32."""
    return codes.astype(np.uint8).view(numpy_dtype(name)).astype(np.float32)


def _encoded(values: Array, name: str) -> Array:
    """Float32, cut to what there is -> the nearest codes, uint8."""
    most = _most(name)
    return np.asarray(np.clip(values, -most, most).astype(numpy_dtype(name)).view(np.uint8))


def _scales(form: WeightFormat, parts: Arrays) -> Array:
    """Of every group, float32 [N / rows, groups]."""
    held = parts["q_scale"].view(numpy_dtype(form.dtype)).astype(np.float32)
    return np.asarray(held / parts["q_super"]) if form.super_group else held


def _dequantize(form: WeightFormat, parts: Arrays) -> Array:
    codes = integer.unpack(form, parts["q_weight"])
    scales = _scales(form, parts)
    group = codes.shape[1] if form.group == WHOLE_ROW else form.group
    per_weight = np.repeat(np.repeat(scales, form.rows, axis=0)[: len(codes)], group, axis=1)[:, : codes.shape[1]]
    return np.asarray(decoded(codes, form.code)[:, : per_weight.shape[1]] * per_weight, np.float32)


def _quantize(form: WeightFormat, matrix: Array, importance: Array | None = None) -> Arrays:
    k = matrix.shape[1]
    group = form.group_of(k)
    padded = np.pad(matrix.astype(np.float32), ((0, 0), (0, -k % group)))
    weights = None if importance is None else np.pad(importance.astype(np.float32), (0, -k % group))

    def some(rows: Array) -> Arrays:
        count = len(rows)
        rows = np.pad(rows, ((0, -count % form.rows), (0, 0)))
        groups = rows.reshape(len(rows) // form.rows, form.rows, -1, group).swapaxes(1, 2)
        return _quantized(form, groups, count, None if weights is None else weights.reshape(1, -1, 1, group))

    return rounding.in_blocks(some, padded, form.rows)


def _quantized(form: WeightFormat, groups: Array, count: int, weights: Array | None) -> Arrays:
    """Groups [N / rows, groups, rows, group] of `count` outputs -> parts."""
    size = np.abs(groups).max((2, 3))
    parts: Arrays = {}
    if form.super_group:
        most = np.float32(_most(form.code) * _most(form.dtype))
        parts["q_super"] = np.divide(most, size.max(1, keepdims=True), out=np.ones((len(size), 1), np.float32),
                                     where=size.max(1, keepdims=True) > 0)  # fmt: skip
    largest = size / np.float32(_most(form.code))
    tried = np.stack([_stored(form, largest * np.float32(step), parts) for step in STEPS[form.bits]])
    errors = np.stack([_error(form, groups, {**parts, "q_scale": scale}, weights) for scale in tried])
    parts["q_scale"] = np.take_along_axis(tried, errors.argmin(0)[None], 0)[0]
    by_row = _codes(form, groups, parts).swapaxes(1, 2).reshape(len(groups) * form.rows, -1)[:count]
    whole = {"q_weight": integer.pack(form, by_row), **parts}
    return {name: whole[name] for name in _shapes(form, 1, 1)}


def _codes(form: WeightFormat, groups: Array, parts: Arrays) -> Array:
    """The nearest codes of groups whose scales are stored, uint8."""
    scale = _scales(form, parts)[..., None, None]
    return _encoded(np.divide(groups, scale, out=np.zeros_like(groups), where=scale != 0), form.code)


def _error(form: WeightFormat, groups: Array, parts: Arrays, weights: Array | None) -> Array:
    """Squared, of each group [N / rows, groups]."""
    if len(STEPS[form.bits]) == 1:
        return np.zeros(groups.shape[:2], np.float32)  # there is nothing to compare
    found = decoded(_codes(form, groups, parts), form.code) * _scales(form, parts)[..., None, None]
    error = np.square(found - groups)
    return np.asarray((error if weights is None else error * weights).sum((2, 3)))


def _stored(form: WeightFormat, scale: Array, parts: Arrays) -> Array:
    """Scales as they are stored: rounded to their type, powers of two where that has no others."""
    scale = scale * parts["q_super"] if form.super_group else scale
    dtype = numpy_dtype(form.dtype)
    if dtype.itemsize > 1:
        return np.asarray(scale.astype(dtype))
    least = ml_dtypes.finfo(dtype).smallest_subnormal if form.dtype == POWER else 0  # of which none is 0
    return np.asarray(np.clip(scale, np.float32(least), np.float32(_most(form.dtype))).astype(dtype).view(np.uint8))


def _random(form: WeightFormat, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Some rows of normal noise, quantized, again and again."""
    rows = min(n, max(POOL // k // form.rows, 1) * form.rows)
    made = _quantize(form, rng.standard_normal((rows, k), np.float32) * np.float32(RANDOM_STD))
    return {
        name: np.resize(made[name], shape) for name, (shape, _) in _shapes(form, n, k).items()
    }  # resize repeats from the start


def _dequantized(
    form: WeightFormat, names: tuple[str, ...], parts: tuple[te.Tensor, ...], k: int, m: int = 0
) -> te.Tensor:
    """float32 [N, k], as a stage of its own; for a product with m rows, if it is one."""
    from tvm import te

    from tunebench.kernels import dequantize

    held = dict(zip(names, parts, strict=True))
    return te.compute(
        (parts[0].shape[0], k),
        lambda n, c: dequantize.code(form, held, n, c),
        name="dequantize",
        attrs=dequantize.lacks(form, m),
    )


def _matmul(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    from tvm.relax.frontend.nn import op

    form = scheme.weight
    x, parts = in_order(form, x, parts)
    names = tuple(parts)

    def product(a: te.Tensor, *held: te.Tensor) -> te.Tensor:
        return float_product(a, _dequantized(form, names, held, int(a.shape[1]), int(a.shape[0])), out_dtype)

    return op.tensor_expr_op(product, f"{scheme.name}_matmul", [x, *parts.values()])


def _take(scheme: Scheme, tokens: Tensor, parts: dict[str, Tensor]) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    from tunebench.kernels import dequantize

    form, names = scheme.weight, tuple(parts)

    def rows(index: te.Tensor, *held: te.Tensor) -> te.Tensor:
        named = dict(zip(names, held, strict=True))
        return te.compute(
            (index.shape[0], held[0].shape[1] * form.per_word),
            lambda i, j: dequantize.code(form, named, index[i], j).astype(scheme.dtype),
            name="take",
        )

    return op.tensor_expr_op(rows, f"{scheme.name}_take", [tokens, *parts.values()])


def _weights(form: WeightFormat, *parts: te.Tensor) -> te.Tensor:
    k = int(parts[0].shape[1]) * form.per_word
    return _dequantized(form, tuple(_shapes(form, 1, k)), parts, k)


KINDS = (
    Kind(
        name="codes",
        schemes=(
            Scheme("fp8f16", WeightFormat("codes", 8, "float32", WHOLE_ROW, code=FP8), "float16"),
            Scheme("mxfp4f16", WeightFormat("codes", 4, POWER, 32, code=FP4), "float16"),
            Scheme("nvfp4f16", WeightFormat("codes", 4, FP8, 16, super_group=WHOLE_ROW, code=FP4), "float16"),
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
