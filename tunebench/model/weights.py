"""Real weights: Hugging Face safetensors, sharded or not, quantized a block of rows at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.architectures import Matrix
from tunebench.model.quantization import Array, Arrays
from tunebench.model.workload import Model, stored_scheme
from tunebench.spec import WeightFormat

ROWS = 2048  # of a matrix held in float32 at once


def read(model: Model, folder: Path) -> Iterator[tuple[str, Array]]:
    """Every parameter in stored form, from the folder's *.safetensors; missing or wrong-shaped ones are named."""
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        tensors.check(_wanted(model))
        for name, length in model.architecture.vectors(model.config).items():
            yield name, tensors.rows(name, 0, length).astype(numpy_dtype(model.workload.scheme.dtype))
        for name, matrix in model.matrices.items():
            for suffix, part in _store(tensors, matrix, stored_scheme(model.workload.scheme, matrix).weight).items():
                yield f"{name}.{suffix}", part


def _wanted(model: Model) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape; 0 rows where several are stacked, as only their sum is known."""
    wanted: dict[str, tuple[int, ...]] = {
        name: (length,) for name, length in model.architecture.vectors(model.config).items()
    }
    for matrix in model.matrices.values():
        rows = matrix.n if len(matrix.sources) == 1 else 0
        wanted.update(dict.fromkeys(matrix.sources, (rows, matrix.k)))
    return wanted


def _store(tensors: _Tensors, matrix: Matrix, weight: WeightFormat) -> Arrays:
    kind = quantization.kind_of(weight)
    blocks = []
    for source in matrix.sources:
        n = tensors.shapes[source][0]
        for start in range(0, n, ROWS):
            rows = tensors.rows(source, start, min(start + ROWS, n)).astype(np.float32)
            blocks.append(kind.quantize(weight, rows))
    axis = 1 if weight.layout == "KN" else 0
    parts = {suffix: np.concatenate([block[suffix] for block in blocks], axis=axis) for suffix in blocks[0]}
    if parts and sum(tensors.shapes[source][0] for source in matrix.sources) != matrix.n:
        raise TuneBenchError(f"{' + '.join(matrix.sources)} do not add up to {matrix.n} rows.")
    return parts


class _Tensors:
    """The tensors of a folder by name, read in slices."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._slices = {}
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (OSError, SafetensorError) as error:
                raise TuneBenchError(f"cannot read {path} ({error}).", "Copy it again.") from None
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                self._slices[name] = file.get_slice(name)
        self.shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor."""
        return np.asarray(self._slices[name][start:stop])

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise a TuneBenchError that names what is missing or has the wrong shape."""
        way_on = "Name the folder of this very model."
        missing = [name for name in wanted if name not in self.shapes]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise TuneBenchError(f"{self.folder} lacks {', '.join(missing[:3])}{more}.", way_on)
        for name, expected in wanted.items():
            shape = self.shapes[name]
            if (shape if expected[0] else (0, *shape[1:])) != expected:
                want = list(expected) if expected[0] else f"[any, {expected[1]}]"
                raise TuneBenchError(f"{name} in {self.folder} has shape {list(shape)}, not {want}.", way_on)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise TuneBenchError(f"{index} is no index of weights ({error!r}).", "Copy it again.") from None
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise TuneBenchError(f"no *.safetensors in {folder}.", "Name a folder with Hugging Face weights.")
    return files
