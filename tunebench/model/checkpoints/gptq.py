"""GPTQ: 4 or 8 bits with a zero point a group, packed along the inputs, which may be in an order of their own."""

from __future__ import annotations

import numpy as np

from tunebench.model.checkpoints import Tensor
from tunebench.model.checkpoints.stored import Format, Settings, Stored
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WHOLE_ROW, WeightFormat


def _scheme(settings: Settings) -> str:
    return f"GPTQ{settings.get('bits', 4)}"


def _tensor(stored: Stored, base: str, settings: Settings) -> Tensor:
    bits = settings.get("bits", 4)
    stored.need(bits in (4, 8), f"{base}.qweight", f"{bits} bits are not supported")
    words, zeros = (stored.array(f"{base}.{each}", 2, "I32") for each in ("qweight", "qzeros"))
    scales, count = stored.floats(f"{base}.scales", 2), 32 // bits
    k, n, groups = count * words.shape[0], words.shape[1], len(scales)
    group = WHOLE_ROW if groups == 1 else k // groups
    whole = k % groups == 0 and k // groups % count == 0
    stored.need(whole, f"{base}.scales", f"{groups} groups do not divide {k} inputs")
    stored.need(scales.shape == (groups, n), f"{base}.scales", "other extents than qweight")
    stored.need(zeros.shape == (groups, n // count), f"{base}.qzeros", "other extents than scales")
    order = grouping(stored, f"{base}.g_idx", k, groups)
    form = WeightFormat("integer", bits, scales.dtype.name, group, "zero_point", ordered=order is not None)
    one_less = settings.get("checkpoint_format", "gptq") == "gptq"  # gptq_v2 stores zero points as they are

    def read(start: int, stop: int) -> Arrays:
        integers = unpack(words[:, start:stop].T, bits)
        zero = unpack(zeros, bits)[:, start:stop].T
        parts = {
            "q_weight": integer.pack(form, integers if order is None else integers[:, order]),
            "q_scale": np.ascontiguousarray(scales[:, start:stop].T),
            "q_zero": (zero + one_less).astype(scales.dtype),
        }
        return parts if order is None else {**parts, "q_order": order}

    return Tensor((n, k), form, read)


def unpack(words: Array, bits: int) -> Array:
    """int32 [rows, words] -> integers [rows, 32 / bits a word]."""
    shifts, mask = np.arange(0, 32, bits, dtype=np.uint32), np.uint32((1 << bits) - 1)
    return (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & mask).reshape(len(words), -1)


def grouping(stored: Stored, name: str, k: int, groups: int) -> Array | None:
    """The inputs in the order in which groups are whole, int32 [k], where that is not their own.

    The tensor `name`, int32 [k], says each input's group; a TuneBenchError where groups differ in size.
    """
    if name not in stored.shapes:
        return None
    of_input = stored.array(name, 1, "I32", "I64")
    order = np.argsort(of_input, kind="stable").astype(np.int32)
    whole = len(of_input) == k and np.array_equal(of_input[order], np.arange(k) // (k // groups))
    stored.need(whole, name, f"it does not name {groups} groups of {k // groups} inputs")
    return None if np.array_equal(order, np.arange(k)) else order


FORMATS = (Format("gptq", (".qweight",), (".qzeros", ".scales", ".g_idx"), _scheme, _tensor),)
