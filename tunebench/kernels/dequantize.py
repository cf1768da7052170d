"""One weight of a stored matrix, as an expression of its parts: for products that are written for no one format."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
from tvm import te, tirx

from tunebench.spec import WHOLE_ROW, WeightFormat

Parts = Mapping[str, te.Tensor]
"""By their names in stored matrices: q_weight, q_scale and so on."""
MANTISSA, BIAS = 23, 127  # of float32
LACKS = "tunebench.lacks"  # a block's annotation: the kernel that would be faster and that there is not


def at(form: WeightFormat, tensor: te.Tensor, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    """What a part has for an output and a column."""
    if form.layout == "N16":
        return tensor[n // 16, k, n % 16]
    return tensor[k, n] if form.layout == "KN" else tensor[n, k]


def integer(form: WeightFormat, parts: Parts, n: tirx.Expr, k: tirx.Expr, dtype: str = "float32") -> tirx.Expr:
    """A weight of integers, computed in `dtype`, or in float32 where its scale is an integer times another one."""
    step = _bits(form, parts, n, k).astype("int32")
    inner = "float32" if form.super_group else dtype
    column = 0 if form.group == WHOLE_ROW else k // form.group

    def of_group(name: str, shared: str = "") -> tirx.Expr:
        value = at(form, parts[name], n, column).astype(inner)
        if shared not in parts:
            return value
        return at(form, parts[shared], n, k // form.super_group).astype(inner) * value

    scale = of_group("q_scale", "q_super")
    if form.zero == "symmetric":
        return ((step - form.zero_point).astype(inner) * scale).astype(dtype)
    if form.zero == "zero_point":
        return (step.astype(inner) - of_group("q_zero")) * scale
    return (step.astype(inner) * scale + of_group("q_min", "q_super_min")).astype(dtype)


def code(form: WeightFormat, parts: Parts, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    """A weight of codes, float32."""
    column = 0 if form.group == WHOLE_ROW else k // form.group
    held = parts["q_scale"][n // form.rows, column]
    is_power = str(parts["q_scale"].dtype) == "uint8"
    scale = decoded(held.astype("uint32"), form.dtype) if is_power else held.astype("float32")
    if "q_super" in parts:
        scale = scale / parts["q_super"][n, 0]
    return decoded(_bits(form, parts, n, k), form.code) * scale


def _bits(form: WeightFormat, parts: Parts, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    """What a weight's words hold of it, uint32."""
    low = _plane(form, parts["q_weight"], form.low_bits, n, k)
    if "q_high" not in parts:
        return low
    return low | _plane(form, parts["q_high"], form.bits - form.low_bits, n, k) << tirx.const(form.low_bits, "uint32")


def _plane(form: WeightFormat, words: te.Tensor, bits: int, n: tirx.Expr, k: tirx.Expr) -> tirx.Expr:
    count = 32 // bits
    place, by_byte = k % count, form.layout == "N16" or form.packing == "by_byte"
    shift = place % 4 * 8 + place // 4 * bits if by_byte else place * bits
    return (at(form, words, n, k // count) >> shift.astype("uint32")) & tirx.const((1 << bits) - 1, "uint32")


def decoded(bits: tirx.Expr, name: str) -> tirx.Expr:
    """A small float, uint32, of a type that ml_dtypes names -> float32. Weights are no NaN, and none comes out."""
    info = ml_dtypes.finfo(getattr(ml_dtypes, name))
    mantissa_bits, exponent_bits = int(info.nmant), int(info.nexp)

    def u32(value: int) -> tirx.Expr:
        return tirx.const(value, "uint32")

    exponent = (bits >> u32(mantissa_bits)) & u32((1 << exponent_bits) - 1)
    if not mantissa_bits:  # powers of two without a sign, the least of them no normal float32
        return tirx.reinterpret("float32", tirx.Select(exponent == u32(0), u32(1 << 22), exponent << u32(MANTISSA)))
    mantissa = bits & u32((1 << mantissa_bits) - 1)
    lifted = exponent + u32(BIAS - (1 - int(info.minexp)))
    normal = tirx.reinterpret("float32", (lifted << u32(MANTISSA)) | (mantissa << u32(MANTISSA - mantissa_bits)))
    least = tirx.const(float(info.smallest_subnormal), "float32")
    size = tirx.Select(exponent == u32(0), mantissa.astype("float32") * least, normal)
    sign = bits >> u32(mantissa_bits + exponent_bits)
    return tirx.Select(sign == u32(0), size, -size)
