"""MXFP4 as gpt-oss has it: experts' matrices in codes of 4 bits, e2m1, and a power of two for each 32 of them."""

from __future__ import annotations

import numpy as np

from tunebench.model.checkpoints import Tensor
from tunebench.model.checkpoints.fp8 import words
from tunebench.model.checkpoints.stored import Format, Settings, Stored
from tunebench.model.quantization import Arrays
from tunebench.spec import WeightFormat

FORM = WeightFormat("codes", 4, "float8_e8m0fnu", 32, code="float4_e2m1fn")


def _scheme(settings: Settings) -> str:
    return "MXFP4"


def _tensor(stored: Stored, base: str, settings: Settings) -> Tensor:
    """Blocks uint8 [experts, rows, k / 32, 16], two codes a byte, the first in its low half; scales without the 16."""
    blocks, scales = stored.array(f"{base}_blocks", 4, "U8"), stored.array(f"{base}_scales", 3, "U8")
    stored.need(blocks.shape == (*scales.shape, 16), f"{base}_blocks", "other extents than its scales")
    experts, rows, groups = scales.shape
    codes = blocks.reshape(experts * rows, groups * 16)
    powers = scales.reshape(experts * rows, groups)

    def read(start: int, stop: int) -> Arrays:
        return {"q_weight": words(codes[start:stop]), "q_scale": np.ascontiguousarray(powers[start:stop])}

    return Tensor((experts * rows, groups * 32), FORM, read)


FORMATS = (Format("mxfp4", ("_blocks",), ("_scales",), _scheme, _tensor, gives=""),)
