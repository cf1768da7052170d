"""Our weight formats as types of ggml, where one holds them without loss, and a matrix's rows as blocks of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WHOLE_ROW, WeightFormat

GROUP = 32  # weights of a block
ROWS = 4096  # of a matrix converted at a time
TYPES = {("symmetric", 4): "Q4_0", ("symmetric", 8): "Q8_0", ("minimum", 4): "Q4_1"}
"""By what a group has, and the bits of a weight."""


def type_of(form: WeightFormat) -> str:
    """The type of ggml that holds a format without loss; empty where there is none."""
    if form.kind == "float":
        return DTYPES[form.dtype].short.upper()
    whole = form.group == WHOLE_ROW or form.group % GROUP == 0
    plain = form.kind == "integer" and not form.super_group and not form.ordered and form.rows == 1
    return TYPES.get((form.zero, form.bits), "") if plain and whole and form.dtype == "float16" else ""


def blocks(form: WeightFormat, parts: Arrays, rows: Array) -> Iterator[Array]:
    """Bytes [some, row bytes] of the rows of a matrix, in their order."""
    by_row = {suffix: integer.by_row(form, array) for suffix, array in parts.items()}
    for start in range(0, len(rows), ROWS):
        some = {suffix: array[rows[start : start + ROWS]] for suffix, array in by_row.items()}
        if form.kind == "float":
            yield np.ascontiguousarray(some["weight"]).view(np.uint8)
        else:
            yield _of_integers(form, some)


def _of_integers(form: WeightFormat, rows: Arrays) -> Array:
    """Blocks of Q4_0: float16 d, weights i and i + 16 in a byte, (q - 8) d. Q4_1: d, m, q d + m. Q8_0: d, signed q d.

    Where another integer stands for 0, the sign of d turns the order of the integers: (15 - q - 8) * -d = (q - 7) * d.
    """
    n, largest = len(rows["q_weight"]), (1 << form.bits) - 1
    integers = integer.unpack(form, rows["q_weight"]).astype(np.uint8).reshape(n, -1, GROUP)
    turned = form.zero == "symmetric" and not form.full_range
    if turned:
        integers = largest - integers
    quants = integers ^ 128  # less 128, as a signed byte
    if form.bits == 4:
        quants = integers[..., : GROUP // 2] | integers[..., GROUP // 2 :] << 4
    held = [-rows["q_scale"] if turned else rows["q_scale"], *[rows[name] for name in ("q_min",) if name in rows]]
    repeats = integers.shape[1] // held[0].shape[1]
    groups = [np.repeat(part.astype(np.float16), repeats, axis=1)[..., None].view(np.uint8) for part in held]
    return np.concatenate([*groups, quants], axis=-1).reshape(n, -1)
