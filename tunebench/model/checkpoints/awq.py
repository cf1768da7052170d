"""AWQ: 4 bits with a zero point a group; a word holds eight outputs of one input in an order of its own."""

from __future__ import annotations

import numpy as np

from tunebench.model.checkpoints import Tensor
from tunebench.model.checkpoints.stored import Format, Settings, Stored
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WeightFormat

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight outputs lies at each place."""


def _scheme(settings: Settings) -> str:
    return "AWQ"


def _tensor(stored: Stored, base: str, settings: Settings) -> Tensor:
    words, zeros = (stored.array(f"{base}.{each}", 2, "I32") for each in ("qweight", "qzeros"))
    scales = stored.floats(f"{base}.scales", 2)
    (k, columns), groups = words.shape, len(scales)
    fits = settings.get("bits", 4) == 4 and k % groups == 0 and k // groups % 8 == 0
    stored.need(fits, f"{base}.qweight", f"{k} inputs in {groups} groups are no AWQ of 4 bits")
    stored.need(zeros.shape == (groups, columns), f"{base}.qzeros", "other extents than scales and qweight")
    stored.need(scales.shape == (groups, 8 * columns), f"{base}.scales", "other extents than qweight")
    form = WeightFormat("integer", 4, scales.dtype.name, k // groups, "zero_point")

    def read(start: int, stop: int) -> Arrays:
        rows = slice(start % 8, start % 8 + stop - start)
        at = slice(start // 8, -(-stop // 8))
        return {
            "q_weight": integer.pack(form, _unpack(words[:, at])[rows]),
            "q_scale": np.ascontiguousarray(scales[:, start:stop].T),
            "q_zero": _unpack(zeros[:, at])[rows].astype(scales.dtype),
        }

    return Tensor((8 * columns, k), form, read)


def _unpack(words: Array) -> Array:
    """int32 [k, n / 8] -> integers [n, k]."""
    integers = np.empty((*words.shape, 8), np.uint32)
    integers[..., ORDER] = words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)
    return integers.reshape(len(words), -1).T


FORMATS = (Format("awq", (".qweight",), (".qzeros", ".scales"), _scheme, _tensor),)
