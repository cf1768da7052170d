"""What compressed-tensors writes: integers of 4 and 8 bits, packed or not, floats of 8 bits, and NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import Tensor
from tunebench.model.checkpoints.fp8 import float8, words
from tunebench.model.checkpoints.gptq import grouping, unpack
from tunebench.model.checkpoints.stored import Format, Settings, Stored
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WHOLE_ROW, WeightFormat, Zero

NVFP4 = WeightFormat("codes", 4, "float8_e4m3fn", 16, super_group=WHOLE_ROW, code="float4_e2m1fn")


def _weights(settings: Settings) -> Mapping[str, object]:
    """What the settings say of weights; a TuneBenchError where groups of layers differ, or say nothing."""
    groups = settings.get("config_groups") or {}
    found = [group.get("weights") for group in groups.values()]
    if not found or not isinstance(found[0], dict) or any(each != found[0] for each in found):
        raise TuneBenchError("config.json: quantization_config.config_groups say no one form of weights.")
    return found[0]


def _scheme(settings: Settings) -> str:
    weights = _weights(settings)
    kind = "W" if weights.get("type") == "int" else "FP"
    return f"CT-{kind}{weights.get('num_bits')}"


def _tensor(stored: Stored, base: str, settings: Settings) -> Tensor:
    weights = _weights(settings)
    if f"{base}.weight_global_scale" in stored.shapes:
        return _nvfp4(stored, base)
    if f"{base}.weight_packed" in stored.shapes:
        return _packed(stored, base, int(str(weights.get("num_bits"))))
    if stored.dtypes.get(f"{base}.weight") == "I8":
        return _bytes(stored, base)
    block = weights.get("block_structure")
    return float8(stored, base, f"{base}.weight_scale", block if isinstance(block, list) else None)


def _packed(stored: Stored, base: str, bits: int) -> Tensor:
    """Words int32 [n, k bits / 32] in order, of integers with 2^(bits - 1) added; zero points are packed along n."""
    name, count = f"{base}.weight_packed", 32 // bits
    stored.need(bits in (4, 8), name, f"{bits} bits are not supported")
    held, scales = stored.array(name, 2, "I32"), stored.floats(f"{base}.weight_scale", 2)
    n, k, groups = len(held), held.shape[1] * count, scales.shape[1]
    shape = stored.array(f"{base}.weight_shape", 1, "I64", "I32").tolist()
    stored.need(shape == [n, k], f"{base}.weight_shape", f"it says {shape}, and there are [{n}, {k}]")
    form = _form(stored, base, scales, (n, k), bits)
    zeros = None
    if form.zero == "zero_point":
        zeros = stored.array(f"{base}.weight_zero_point", 2, "I32")
        stored.need(zeros.shape == (-(-n // count), groups), f"{base}.weight_zero_point", "other extents than scales")
    order = grouping(stored, f"{base}.weight_g_idx", k, groups)
    form = replace(form, ordered=order is not None)

    def read(start: int, stop: int) -> Arrays:
        packed = words(held[start:stop])
        if order is not None:
            packed = integer.pack(form, unpack(packed, bits)[:, order])
        parts = {"q_weight": packed, "q_scale": np.ascontiguousarray(scales[start:stop])}
        if zeros is not None:
            parts["q_zero"] = unpack(zeros.T, bits).T[start:stop].astype(scales.dtype)
        return parts if order is None else {**parts, "q_order": order}

    return Tensor((n, k), form, read)


def _bytes(stored: Stored, base: str) -> Tensor:
    """Signed bytes [n, k], of which 128 is taken as the zero of unsigned ones."""
    held, scales = stored.array(f"{base}.weight", 2, "I8"), stored.floats(f"{base}.weight_scale", 2)
    form = _form(stored, base, scales, held.shape, 8)
    stored.need(held.shape[1] % 4 == 0, f"{base}.weight", f"{held.shape[1]} inputs fill no whole words")
    zeros = stored.array(f"{base}.weight_zero_point", 2, "I8") if form.zero == "zero_point" else None
    same = zeros is None or zeros.shape == scales.shape
    stored.need(same, f"{base}.weight_zero_point", "other extents than weight_scale")

    def read(start: int, stop: int) -> Arrays:
        unsigned = held[start:stop].view(np.uint8) ^ np.uint8(128)
        parts = {"q_weight": words(unsigned), "q_scale": np.ascontiguousarray(scales[start:stop])}
        return parts if zeros is None else {**parts, "q_zero": (zeros[start:stop] + 128.0).astype(scales.dtype)}

    return Tensor(held.shape, form, read)


def _form(stored: Stored, base: str, scales: Array, shape: tuple[int, ...], bits: int) -> WeightFormat:
    """Integers with scales [n, groups], symmetric where there are no zero points."""
    (n, k), groups = shape, scales.shape[1]
    fits = len(scales) == n and k % groups == 0
    stored.need(fits, f"{base}.weight_scale", f"scales {list(scales.shape)} for weights [{n}, {k}]")
    symmetric = f"{base}.weight_zero_point" not in stored.shapes
    zero: Zero = "symmetric" if symmetric else "zero_point"
    group = WHOLE_ROW if groups == 1 else k // groups
    return WeightFormat("integer", bits, scales.dtype.name, group, zero, full_range=symmetric)


def _nvfp4(stored: Stored, base: str) -> Tensor:
    """Codes uint8 [n, k / 2], e2m1, the first in the low half; scales e4m3 [n, k / 16], divided by the matrix's one."""
    held, scales = stored.array(f"{base}.weight_packed", 2, "U8"), stored.array(f"{base}.weight_scale", 2, "F8_E4M3")
    whole = stored.array(f"{base}.weight_global_scale", 1, "F32")
    (n, half), groups = held.shape, scales.shape[1]
    stored.need(scales.shape == (n, half // 8), f"{base}.weight_scale", f"other extents than weights [{n}, {2 * half}]")
    stored.need(whole.size == 1, f"{base}.weight_global_scale", "there are several")

    def read(start: int, stop: int) -> Arrays:
        return {
            "q_weight": words(held[start:stop]),
            "q_scale": np.ascontiguousarray(scales[start:stop]).view(np.uint8),
            "q_super": np.full((stop - start, 1), whole[0], np.float32),
        }

    return Tensor((n, 16 * groups), NVFP4, read)


FORMATS = (
    Format(
        "compressed-tensors",
        (".weight_scale",),
        tuple(f".weight{each}" for each in ("", "_packed", "_shape", "_zero_point", "_g_idx", "_global_scale"))
        + tuple(f".input_{each}" for each in ("scale", "zero_point", "global_scale")),
        _scheme,
        _tensor,
    ),
)
