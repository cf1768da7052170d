"""ggml's types of blocks: bytes of rows -> the parts of a weight format, no value changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import WeightFormat

SUPER = 256
"""Weights of a block of the K types."""


@dataclass(frozen=True)
class Block:
    """A type of block: its weights and bytes, the format that it is, and how the parts come out of its bytes."""

    weights: int
    bytes: int
    form: WeightFormat
    parts: Callable[[Array], Arrays]  # uint8 [rows, blocks, bytes]; parts of columns come as [rows, blocks, some]

    def read(self, rows: Array) -> Arrays:
        """Bytes, uint8 [rows, bytes of a row] -> parts."""
        blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, self.bytes)
        return {
            name: np.ascontiguousarray(part.reshape(len(rows), -1) if part.ndim > 1 else part)
            for name, part in self.parts(blocks).items()
        }


def _half(blocks: Array, at: int) -> Array:
    """The float16 at a byte: [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)


def _nibbles(blocks: Array) -> Array:
    """Bytes [..., n] -> all low halves, then all high ones [..., 2 n]."""
    return np.concatenate([blocks & np.uint8(15), blocks >> np.uint8(4)], axis=-1)


def _words(integers: Array, bits: int) -> Array:
    """[rows, blocks, weights] -> words [rows, words of a row], in order."""
    form = WeightFormat("integer", bits, "float16")
    return integer.pack(form, integers.reshape(len(integers), -1))


def _q4_0(blocks: Array) -> Arrays:
    return {"q_weight": _words(_nibbles(blocks[..., 2:]), 4), "q_scale": _half(blocks, 0)}


def _q4_1(blocks: Array) -> Arrays:
    return {"q_weight": _words(_nibbles(blocks[..., 4:]), 4), "q_scale": _half(blocks, 0), "q_min": _half(blocks, 2)}


def _q5_0(blocks: Array) -> Arrays:
    high = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")
    return {"q_weight": _words(_nibbles(blocks[..., 6:]), 4), "q_high": _words(high, 1), "q_scale": _half(blocks, 0)}


def _q8_0(blocks: Array) -> Arrays:
    return {"q_weight": _words(blocks[..., 2:] ^ np.uint8(128), 8), "q_scale": _half(blocks, 0)}


def _q4_k(blocks: Array) -> Arrays:
    """Eight groups: scales and minimums of 6 bits in 12 bytes, each 32 bytes two groups, low halves and high ones."""
    low, middle, high = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=-1)
    minimum = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=-1)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    return {
        "q_weight": _words(_nibbles(pairs).reshape(*blocks.shape[:2], SUPER), 4),
        "q_scale": scale,
        "q_min": minimum,
        "q_super": _half(blocks, 0),
        "q_super_min": -_half(blocks, 2),
    }


def _q6_k(blocks: Array) -> Arrays:
    """Sixteen groups of 16: 128 bytes of lower four bits, 64 of upper two, signed scales."""
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64)).reshape(*blocks.shape[:2], SUPER)
    halves = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = (halves >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & np.uint8(3)
    return {
        "q_weight": _words(low, 4),
        "q_high": _words(high, 2),
        "q_scale": np.ascontiguousarray(blocks[..., 192:208]).view(np.int8),
        "q_super": _half(blocks, 208),
    }


def _mxfp4(blocks: Array) -> Arrays:
    return {"q_weight": _words(_nibbles(blocks[..., 1:]), 4), "q_scale": blocks[..., :1]}


def _integer(bits: int, group: int = 32, **more: object) -> WeightFormat:
    packing = "planes" if bits in (5, 6) else "in_order"
    return WeightFormat("integer", bits, "float16", group, packing=packing, **more)  # type: ignore[arg-type]


BLOCKS = {
    "Q4_0": Block(32, 18, _integer(4, full_range=True), _q4_0),
    "Q4_1": Block(32, 20, _integer(4, zero="minimum"), _q4_1),
    "Q5_0": Block(32, 22, _integer(5, full_range=True), _q5_0),
    "Q8_0": Block(32, 34, _integer(8, full_range=True), _q8_0),
    "Q4_K": Block(SUPER, 144, _integer(4, zero="minimum", super_group=SUPER), _q4_k),
    "Q6_K": Block(SUPER, 210, _integer(6, 16, full_range=True, super_group=SUPER), _q6_k),
    "MXFP4": Block(32, 17, WeightFormat("codes", 4, "float8_e8m0fnu", 32, code="float4_e2m1fn"), _mxfp4),
}
"""By ggml's name of the type."""
