"""Stored weights as Hugging Face's tensors again: what loading stacked, arranged, scaled and quantized, undone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunebench.engines.base import Weights
from tunebench.model import quantization
from tunebench.model.checkpoints import undealt
from tunebench.model.description import Dealt, Matrix, Vector
from tunebench.model.quantization import Array, Arrays

if TYPE_CHECKING:
    from tunebench.model.workload import Model


def grouped(model: Model, weights: Weights) -> Iterator[tuple[str, Arrays]]:
    """Each weight with all its parts; a vector's only part has no suffix."""
    name, parts = "", Arrays()
    for full, array in weights:
        owner, _, suffix = full.rpartition(".")
        if full in model.vectors:
            owner, suffix = full, ""
        if parts and owner != name:
            yield name, parts
            parts = Arrays()
        name = owner
        parts[suffix] = array
    yield name, parts


def tensors(model: Model, weights: Weights) -> Iterator[tuple[str, Array]]:
    """Every tensor under Hugging Face's name: floats as they are stored, anything else in float32."""
    lengths, pieces = _lengths(model), itertools.chain.from_iterable(map(model.pieces, model.matrices.values()))
    matrices = {piece.name: piece for piece in pieces}
    for name, parts in grouped(model, weights):
        if name in matrices:
            matrix = matrices[name]
            yield from _unstacked(matrix, matrix.sources, lengths, _floats(model, matrix, parts))
        else:
            vector = model.vectors[name]
            array = (parts[""].astype(np.float32) - vector.plus) / vector.times
            yield from _unstacked(vector, vector.stored, lengths, array)


def _floats(model: Model, matrix: Matrix, parts: Arrays) -> Array:
    form = model.scheme_of(matrix).weight
    found = parts["weight"] if form.kind == "float" else quantization.kind_of(form).dequantize(form, parts)
    return found[: matrix.n, : matrix.k]


def _lengths(model: Model) -> dict[str, int]:
    """The rows of each tensor that is stacked with unlike ones: queries, keys and values."""
    found: dict[str, int] = {}
    for attention in model.decoder.attentions:
        qkv, keys = attention.qkv, attention.kv_heads * attention.dim
        queries = attention.heads * attention.dim * (1 + attention.gated)
        for names in (qkv.sources, qkv.bias.stored if qkv.bias else ()):
            if len(names) > 1:
                found |= dict(zip(names, (queries, keys, keys), strict=True))
    return found


def _unstacked(
    block: Matrix | Vector, names: Sequence[str], lengths: Mapping[str, int], array: Array
) -> Iterator[tuple[str, Array]]:
    """The tensors in rows, those of which no length is known of the same, as Hugging Face has them."""
    ends = np.cumsum([lengths.get(name, len(array) // len(names)) for name in names])
    for name, rows in zip(names, np.split(array, ends[:-1]), strict=True):
        dealt = block.dealt[names.index(name)] if block.dealt else ()
        yield name, _as_stored(block, max(block.experts // len(names), 1), rows, dealt)


def _as_stored(block: Matrix | Vector, experts: int, rows: Array, dealt: Dealt) -> Array:
    """Rows of so many experts in the order and shape of their tensor."""
    width = rows.shape[1:]
    rows = rows.reshape(experts, -1, *width)
    rows = rows[:, np.argsort(undealt(rows.shape[1], *dealt))]
    if isinstance(block, Matrix) and block.transposed:
        return rows.swapaxes(1, 2)
    return rows if isinstance(block, Vector) and block.experts > 1 else rows.reshape(-1, *width)
