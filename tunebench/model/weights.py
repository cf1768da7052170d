"""Real weights: a checkpoint's, as they are stored there or quantized a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization, sources
from tunebench.model.checkpoints import Checkpoint, reordered, undealt
from tunebench.model.description import Dealt, Matrix, Vector
from tunebench.model.quantization import Array, Arrays
from tunebench.model.workload import Model, random_weights
from tunebench.spec import WeightFormat

ROWS = 2048  # of a matrix held in float32 at once
WAY_ON = "Name the folder or file of this very model."


def load(model: Model, named: str, seed: int) -> Iterator[tuple[str, Array]]:
    """Every parameter in stored form, of the weights that `chosen` finds, or made up."""
    checkpoint = chosen(model, named)
    return read(model, checkpoint) if checkpoint else random_weights(model, seed)


def chosen(model: Model, named: str) -> Checkpoint | None:
    """The weights in a folder or .gguf that is named; without a name the model's own; None for `random`, or without."""
    if not are_real(model, named):
        return None
    return sources.open_weights(Path(named)) if named else model.checkpoint


def are_real(model: Model, named: str) -> bool:
    """Whether weights are not made up."""
    return named != "random" and bool(named or (model.source and model.source.weights))


def read(model: Model, checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """Every parameter in stored form.

    A TuneBenchError names a tensor that is missing, of another shape or type, or not finite.
    """
    _check(checkpoint, _wanted(model))
    for matrix in model.matrices.values():
        _check_rows(checkpoint, matrix)
    for name, vector in model.vectors.items():
        yield name, _vector(checkpoint, vector, vector.dtype or model.workload.scheme.dtype)
    for matrix in model.matrices.values():
        for piece in model.pieces(matrix):
            form = model.scheme_of(piece).weight
            as_stored = quantization.by_rows(form) == checkpoint.tensors[piece.sources[0]].form
            make = _stored if as_stored else _quantized
            parts = make(checkpoint, piece, form)
            for suffix, part in parts.items():
                yield f"{piece.name}.{suffix}", part


def _wanted(model: Model) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape; 0 rows where several are stacked, as only their sum is known."""
    wanted: dict[str, tuple[int, ...]] = {}
    for vector in model.vectors.values():
        shape = (vector.length,) if vector.experts == 1 else (vector.experts, vector.length // vector.experts)
        wanted.update(dict.fromkeys(vector.stored, shape if len(vector.stored) == 1 else (0,)))
    for matrix in model.matrices.values():
        rows = matrix.n if len(matrix.sources) == 1 else 0
        wanted.update(dict.fromkeys(matrix.sources, (rows, matrix.k)))
    return wanted


def _dealt(block: Matrix | Vector) -> tuple[Dealt, ...]:
    """How the rows of each source lie."""
    names = block.sources if isinstance(block, Matrix) else block.stored
    return block.dealt or ((),) * len(names)


def _order(n: int, dealt: Dealt, experts: int) -> Array:
    """Where each of n rows is found, as `dealt` says of those of each expert."""
    order = undealt(n // experts, *dealt)
    return np.concatenate([expert * len(order) + order for expert in range(experts)])


def _check(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise a TuneBenchError that names what is missing, or has the wrong shape or type."""
    missing = [name for name in wanted if name not in checkpoint.tensors]
    if missing:
        raise checkpoint.lacks(missing)
    for name, expected in wanted.items():
        shape = checkpoint.tensors[name].shape
        if (shape if expected[0] else (0, *shape[1:])) != expected:
            want = list(expected) if expected[0] else f"[any, {expected[1]}]"
            raise TuneBenchError(f"{name} in {checkpoint.path} has shape {list(shape)}, not {want}.", WAY_ON)


def _check_rows(checkpoint: Checkpoint, matrix: Matrix) -> None:
    """Raise a TuneBenchError where the tensors stacked in a matrix have other rows than it."""
    rows = [checkpoint.tensors[source].shape[0] for source in matrix.sources]
    if (len(rows) > 1 and sum(rows) != matrix.n) or not all(rows):
        raise TuneBenchError(f"{' + '.join(matrix.sources)} have {rows} rows, not {matrix.n} in all.", WAY_ON)


def _vector(checkpoint: Checkpoint, vector: Vector, dtype: str) -> Array:
    """A vector in its type, from the tensors that it consists of."""
    stored = [checkpoint.floats(name, 0, checkpoint.tensors[name].shape[0]) for name in vector.stored]
    flat = [part.reshape(-1) for part in stored]
    parts = [part[_order(part.size, dealt, vector.experts)] for part, dealt in zip(flat, _dealt(vector), strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        found = (np.concatenate(parts).astype(np.float64) * vector.times + vector.plus).astype(numpy_dtype(dtype))
    _check_finite(checkpoint, vector.name, found)
    return found


def _stored(checkpoint: Checkpoint, matrix: Matrix, form: WeightFormat) -> Arrays:
    """A matrix's parts as its tensors have them, one below the other, in the form's layout."""
    held = []
    for source, dealt in zip(matrix.sources, _dealt(matrix), strict=True):
        n = checkpoint.tensors[source].shape[0]
        parts = checkpoint.parts(source, 0, n)
        if dealt:
            parts = reordered(parts, _order(n, dealt, matrix.experts))
        _check_finite(checkpoint, source, *_numbers(form, parts))
        held.append(parts)
    return quantization.kind_of(form).laid_out(form, _joined(held))


def _numbers(form: WeightFormat, parts: Arrays) -> Iterator[Array]:
    """What is no integer in the parts of a matrix: also what has the bits of small floats."""
    for name, part in parts.items():
        if form.kind == "codes" and name == "q_weight" and form.bits == 8:
            yield part.view(numpy_dtype(form.code))
        elif form.kind == "codes" and part.dtype.itemsize == 1:
            yield part.view(numpy_dtype(form.dtype))
        else:
            yield part


def _joined(blocks: Sequence[Arrays]) -> Arrays:
    """Parts of rows one below the other; what all rows have in common once."""
    shared = {name: part for name, part in blocks[0].items() if name == quantization.ORDER}
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]} | shared


def _quantized(checkpoint: Checkpoint, matrix: Matrix, form: WeightFormat) -> Arrays:
    """A matrix's parts made from floats, some rows at a time."""
    kind, by_rows = quantization.kind_of(form), quantization.by_rows(form)
    blocks = []
    for source, dealt in zip(matrix.sources, _dealt(matrix), strict=True):
        for rows in _floats(checkpoint, matrix, source, dealt):
            _check_finite(checkpoint, source, rows)
            block = kind.quantize(by_rows, rows)
            _check_finite(checkpoint, source, *block.values())
            blocks.append(block)
    return kind.laid_out(form, _joined(blocks))


def _floats(checkpoint: Checkpoint, matrix: Matrix, source: str, dealt: Dealt) -> Iterator[Array]:
    """A tensor's rows in the order in which they lie here; all of an expert at once where that is another one."""
    n = checkpoint.tensors[source].shape[0]
    if not dealt:
        for start in range(0, n, ROWS):
            yield checkpoint.floats(source, start, min(start + ROWS, n))
        return
    step = n // matrix.experts
    for start in range(0, n, step):
        rows = checkpoint.floats(source, start, start + step)
        yield rows[undealt(len(rows), *dealt)]


def _check_finite(checkpoint: Checkpoint, name: str, *arrays: Array) -> None:
    """Raise a TuneBenchError where what was made of a tensor has a value that is not finite."""
    for array in arrays:
        if array.dtype.kind not in "iu" and not np.isfinite(array.astype(np.float32)).all():
            what = f"{name} in {checkpoint.path} has values that are not finite in {array.dtype}"
            raise TuneBenchError(f"{what}.", "Copy it again, or choose a scheme of larger floats.")
