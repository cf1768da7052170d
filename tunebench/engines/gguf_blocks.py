"""Our weight formats as types of ggml, where one holds them without loss, and a matrix's rows as blocks of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WHOLE_ROW, WeightFormat

ROWS = 4096  # of a matrix converted at a time


@dataclass(frozen=True)
class _Type:
    """A type of ggml: the weights of a block, and its bytes [rows, blocks, ...] of integers [rows, blocks, weights]."""

    name: str
    weights: int
    pack: Callable[[Array, Arrays], Array]  # (integers, what groups have by name, [rows, blocks, some])


def type_of(form: WeightFormat, k: int) -> str:
    """The type that holds rows of `k` weights of a format without loss; empty where there is none."""
    if form.kind == "float":
        return DTYPES[form.dtype].short.upper()
    found = _type(form)
    return found.name if found and k % found.weights == 0 else ""


def blocks(form: WeightFormat, parts: Arrays, rows: Array) -> Iterator[Array]:
    """Bytes [some, row bytes] of the rows of a matrix, in their order."""
    by_row = {suffix: integer.by_row(form, array) for suffix, array in parts.items()}
    for start in range(0, len(rows), ROWS):
        some = {suffix: array[rows[start : start + ROWS]] for suffix, array in by_row.items()}
        if form.kind == "float":
            yield np.ascontiguousarray(some["weight"]).view(np.uint8)
        else:
            yield _packed(form, some)


def _type(form: WeightFormat) -> _Type | None:
    if form.ordered or form.rows > 1:
        return None
    if form.kind == "codes":
        return MXFP4 if (form.code, form.dtype, form.group) == ("float4_e2m1fn", "float8_e8m0fnu", 32) else None
    if form.dtype != "float16":
        return None
    if form.super_group:
        return SUPER.get((form.zero, form.bits, form.group, form.full_range))
    return PLAIN.get((form.zero, form.bits)) if form.group == WHOLE_ROW or form.group % 32 == 0 else None


def _packed(form: WeightFormat, rows: Arrays) -> Array:
    """Where not the middle one of the integers stands for 0, the sign of d turns them: (15-q-8) * -d = (q-7) * d."""
    kind, n = _type(form), len(rows["q_weight"])
    if kind is None:
        raise ValueError(f"no type of ggml holds {form}")
    unpack = integer.unpacked if form.kind == "integer" else lambda form, rows: integer.unpack(form, rows["q_weight"])
    integers = unpack(form, rows).astype(np.uint8).reshape(n, -1, kind.weights)
    held = {name: part for name, part in rows.items() if name not in ("q_weight", "q_high")}
    if form.kind == "integer" and form.zero == "symmetric" and not form.full_range:
        integers, held = (1 << form.bits) - 1 - integers, {"q_scale": -held["q_scale"]}
    count = integers.shape[1]
    by_block = {
        name: np.repeat(part, max(count // part.shape[1], 1), axis=1).reshape(n, count, -1)
        for name, part in held.items()
    }
    return kind.pack(integers, by_block).reshape(n, -1)


def _bytes(*parts: Array) -> Array:
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], axis=-1)


def _halves(integers: Array, count: int = 32) -> Array:
    """Of each `count` weights the first half in the low bits of bytes, the second in the high ones."""
    pairs = (integers & 15).reshape(*integers.shape[:2], -1, 2, count // 2)
    return (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*integers.shape[:2], -1)


def _fours(integers: Array, groups: Arrays) -> Array:
    """d, the minimum where there is one, then halves of bytes."""
    return _bytes(*groups.values(), _halves(integers))


def _fives(integers: Array, groups: Arrays) -> Array:
    """The same with every fifth bit before the halves of bytes."""
    return _bytes(*groups.values(), np.packbits(integers >> 4, axis=-1, bitorder="little"), _halves(integers))


def _eights(integers: Array, groups: Arrays) -> Array:
    """d and signed bytes."""
    return _bytes(groups["q_scale"], integers ^ 128)


def _super_fours(integers: Array, groups: Arrays) -> Array:
    """d and that of the minimums, which are subtracted; eight scales and minimums of 6 bits; halves of bytes."""
    scale, low = groups["q_scale"].astype(np.uint8), groups["q_min"].astype(np.uint8)
    first, more = np.s_[..., :4], np.s_[..., 4:]
    upper = [part[first] | part[more] >> 4 << 6 for part in (scale, low)]
    lower = scale[more] & 15 | (low[more] & 15) << 4
    return _bytes(groups["q_super"], -groups["q_super_min"], *upper, lower, _halves(integers, 64))


def _super_sixes(integers: Array, groups: Arrays) -> Array:
    """Halves of bytes, the upper two bits of four weights in a byte, sixteen signed scales, d."""
    fours = (integers >> 4).reshape(*integers.shape[:2], 2, 4, 32)
    high = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2)
    high = high.reshape(*integers.shape[:2], -1)
    return _bytes(_halves(integers, 128), high, groups["q_scale"].astype(np.int8), groups["q_super"])


PLAIN = {
    ("symmetric", 4): _Type("Q4_0", 32, _fours),
    ("minimum", 4): _Type("Q4_1", 32, _fours),
    ("symmetric", 5): _Type("Q5_0", 32, _fives),
    ("minimum", 5): _Type("Q5_1", 32, _fives),
    ("symmetric", 8): _Type("Q8_0", 32, _eights),
}
"""By what a group has, and the bits of a weight; of any groups of whole blocks, whose scale is repeated."""
SUPER = {
    ("minimum", 4, 32, False): _Type("Q4_K", 256, _super_fours),
    ("symmetric", 6, 16, True): _Type("Q6_K", 256, _super_sixes),
}
"""By that, the group, and whether the middle integer stands for 0."""
MXFP4 = _Type("MXFP4", 32, _fours)
