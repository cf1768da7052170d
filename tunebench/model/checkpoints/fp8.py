"""Floats of 8 bits, e4m3, with a scale a matrix, an output or a block of both."""

from __future__ import annotations

import numpy as np

from tunebench.model.checkpoints import Tensor
from tunebench.model.checkpoints.stored import Format, Settings, Stored
from tunebench.model.quantization import Array, Arrays
from tunebench.spec import WHOLE_ROW, WeightFormat

CODE = "float8_e4m3fn"


def _scheme(settings: Settings) -> str:
    return "FP8"


def _tensor(stored: Stored, base: str, settings: Settings) -> Tensor:
    inverse = f"{base}.weight_scale_inv"
    block = settings.get("weight_block_size")
    return float8(stored, base, inverse if inverse in stored.shapes else f"{base}.weight_scale", block)


def float8(stored: Stored, base: str, scale_name: str, block: list[int] | None) -> Tensor:
    """A matrix of e4m3 and its scales [], [1], [n], [n, 1], or [n / rows, k / columns] of blocks [rows, columns]."""
    codes, scales = stored.array(f"{base}.weight", 2, "F8_E4M3"), _scales(stored, scale_name)
    (n, k), rows = codes.shape, 1
    if scales.size == 1:
        scales = np.broadcast_to(scales.reshape(1, 1), (n, 1))
    elif scales.ndim == 1:
        scales = scales[:, None]
    group = WHOLE_ROW if scales.shape == (n, 1) else 0
    if not group and block:
        rows, group = block
    stored.need(group != 0, scale_name, f"scales {list(scales.shape)} for weights [{n}, {k}]")
    whole = group == WHOLE_ROW or (k % group == 0 and scales.shape == (-(-n // rows), k // group))
    stored.need(whole, scale_name, f"scales {list(scales.shape)} for weights [{n}, {k}] in blocks [{rows}, {group}]")
    form = WeightFormat("codes", 8, scales.dtype.name, group, code=CODE, rows=rows)

    def read(start: int, stop: int) -> Arrays:
        held = scales[start // rows : -(-stop // rows)]
        return {"q_weight": words(codes[start:stop]), "q_scale": np.ascontiguousarray(held)}

    return Tensor((n, k), form, read)


def words(stored: Array) -> Array:
    """Rows of bytes, of any type of one byte, -> uint32 [rows, bytes / 4]."""
    return np.ascontiguousarray(stored).view(np.uint32)


def _scales(stored: Stored, name: str) -> Array:
    return stored.floats(name, len(stored.shapes.get(name, ())))


FORMATS = tuple(
    Format(
        name,
        (".weight_scale_inv", ".weight_scale"),
        (".weight", ".input_scale", ".activation_scale"),
        _scheme,
        _tensor,
    )
    for name in ("fp8", "fbgemm_fp8")
)
