"""Stored weights as Hugging Face's tensors again: what loading stacked, arranged, scaled and quantized, undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tunebench.engines.base import Weights
from tunebench.model import quantization
from tunebench.model.description import Attention, Matrix
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
    lengths = _lengths(model)
    of_bias = {matrix.bias.name: matrix for matrix in model.matrices.values() if matrix.bias}
    for name, parts in grouped(model, weights):
        if name in model.matrices:
            matrix = model.matrices[name]
            yield from _unstacked(matrix.sources, lengths.get(name), matrix, _floats(model, matrix, parts))
        else:
            vector = model.vectors[name]
            array = (parts[""].astype(np.float32) - vector.plus) / vector.times
            yield from _unstacked(vector.stored, lengths.get(name), of_bias.get(name), array)


def _floats(model: Model, matrix: Matrix, parts: Arrays) -> Array:
    form = model.scheme_of(matrix).weight
    return parts["weight"] if form.kind == "float" else quantization.kind_of(form).dequantize(form, parts)


def _lengths(model: Model) -> dict[str, tuple[int, ...]]:
    """The rows of each tensor in what is stacked of unlike ones: queries, keys and values."""
    found: dict[str, tuple[int, ...]] = {}
    for layer in model.decoder.layers:
        qkv = layer.attention.qkv
        if len(qkv.sources) == len(_qkv(layer.attention)):
            found |= {block.name: _qkv(layer.attention) for block in (qkv, qkv.bias) if block}
    return found


def _qkv(attention: Attention) -> tuple[int, ...]:
    keys = attention.kv_heads * attention.dim
    return attention.heads * attention.dim, keys, keys


def _unstacked(
    names: tuple[str, ...], lengths: tuple[int, ...] | None, matrix: Matrix | None, array: Array
) -> Iterator[tuple[str, Array]]:
    """The tensors in rows, each of its length or all of the same, their rows as Hugging Face has them."""
    lengths = lengths or (len(array) // len(names),) * len(names)
    for name, rows in zip(names, np.split(array, np.cumsum(lengths)[:-1]), strict=True):
        outer, inner = matrix.arranged if matrix else (1, 1)
        yield name, rows.reshape(inner, outer, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
