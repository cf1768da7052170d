"""Stored weights as Hugging Face's tensors again: what loading stacked, arranged, scaled and quantized, undone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.engines import torch_tensors
from tunebench.engines.base import Weights
from tunebench.model.checkpoints import undealt
from tunebench.model.description import Dealt, Matrix, Vector
from tunebench.model.quantization import Arrays

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


def tensors(model: Model, weights: Weights, dtype: Any, device: str) -> Iterator[tuple[str, Any]]:
    """Every tensor under Hugging Face's name, in a float type of PyTorch's, on a device."""
    lengths, pieces = _lengths(model), itertools.chain.from_iterable(map(model.pieces, model.matrices.values()))
    matrices = {piece.name: piece for piece in pieces}
    for name, parts in grouped(model, weights):
        if name in matrices:
            matrix = matrices[name]
            form = model.scheme_of(matrix).weight
            found = torch_tensors.dequantized(form, parts, matrix.n, matrix.k, dtype, device)
            yield from _unstacked(matrix, matrix.sources, lengths, found)
        else:
            vector = model.vectors[name]
            array = (parts[""].astype(np.float32) - vector.plus) / vector.times
            yield from _unstacked(vector, vector.stored, lengths, torch_tensors.tensor(array, device).to(dtype))


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
    block: Matrix | Vector, names: Sequence[str], lengths: Mapping[str, int], found: Any
) -> Iterator[tuple[str, Any]]:
    """The tensors in rows, those of which no length is known of the same, as Hugging Face has them."""
    split = found.split([lengths.get(name, len(found) // len(names)) for name in names])
    for name, rows in zip(names, split, strict=True):
        dealt = block.dealt[names.index(name)] if block.dealt else ()
        yield name, _as_stored(block, max(block.experts // len(names), 1), rows, dealt)


def _as_stored(block: Matrix | Vector, experts: int, rows: Any, dealt: Dealt) -> Any:
    """Rows of so many experts in the order and shape of their tensor."""
    width = rows.shape[1:]
    rows = rows.reshape(experts, -1, *width)
    if dealt:
        rows = rows[:, torch_tensors.tensor(np.argsort(undealt(rows.shape[1], *dealt)), rows.device)]
    if isinstance(block, Matrix) and block.transposed:
        return rows.swapaxes(1, 2).contiguous()
    return rows if isinstance(block, Vector) and block.experts > 1 else rows.reshape(-1, *width)
