"""Real weights: Hugging Face safetensors, sharded or not, quantized a block of rows at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from tunebench import stored
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.description import Dealt, Matrix, Vector
from tunebench.model.quantization import Array, Arrays
from tunebench.model.workload import Model
from tunebench.spec import WeightFormat

ROWS = 2048  # of a matrix held in float32 at once
INDEX = "model.safetensors.index.json"
INDEX_BYTES = 64 << 20
FLOATS = ("F16", "BF16", "F32", "F64")
WAY_ON = "Name the folder of this very model."


def read(model: Model, folder: Path) -> Iterator[tuple[str, Array]]:
    """Every parameter in stored form, from the folder's *.safetensors.

    A TuneBenchError names a tensor that is missing, of another shape or type, or not finite.
    """
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(folder, stack)
        tensors.check(_wanted(model))
        for matrix in model.matrices.values():
            tensors.check_rows(matrix)
        for name, vector in model.vectors.items():
            yield name, _vector(tensors, vector, vector.dtype or model.workload.scheme.dtype)
        for name, matrix in model.matrices.items():
            for suffix, part in _store(tensors, matrix, model.scheme_of(matrix).weight).items():
                yield f"{name}.{suffix}", part


def _wanted(model: Model) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape; 0 rows where several are stacked, as only their sum is known."""
    wanted: dict[str, tuple[int, ...]] = {}
    for vector in model.vectors.values():
        wanted.update(dict.fromkeys(vector.stored, (vector.length if len(vector.stored) == 1 else 0,)))
    for matrix in model.matrices.values():
        rows = matrix.n if len(matrix.sources) == 1 else 0
        wanted.update(dict.fromkeys(matrix.sources, (rows, matrix.k)))
    return wanted


def _vector(tensors: _Tensors, vector: Vector, dtype: str) -> Array:
    """A vector in its type, from the tensors that it consists of."""
    stored = [tensors.stored(name, 0, tensors.shapes[name][0], "float64") for name in vector.stored]
    parts = [part.reshape(-1)[_order(part.size, *dealt)] for part, dealt in zip(stored, _dealt(vector), strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        found = (np.concatenate(parts) * vector.times + vector.plus).astype(numpy_dtype(dtype))
    tensors.check_finite(vector.name, found)
    return found


def _store(tensors: _Tensors, matrix: Matrix, weight: WeightFormat) -> Arrays:
    kind = quantization.kind_of(weight)
    blocks = []
    for source, dealt in zip(matrix.sources, _dealt(matrix), strict=True):
        n = tensors.shapes[source][0]
        step = n if dealt else ROWS
        for start in range(0, n, step):
            rows = tensors.rows(source, start, min(start + step, n), "float32")
            block = kind.quantize(weight, rows[_order(len(rows), *dealt)])
            tensors.check_finite(source, *block.values())
            blocks.append(block)
    axis = 1 if weight.layout == "KN" else 0
    return {suffix: np.concatenate([block[suffix] for block in blocks], axis=axis) for suffix in blocks[0]}


def _dealt(weight: Matrix | Vector) -> tuple[Dealt, ...]:
    """How the rows of each source lie."""
    sources = weight.sources if isinstance(weight, Matrix) else weight.stored
    return weight.dealt or ((),) * len(sources)


def _order(n: int, runs: int = 1, *widths: int) -> Array:
    """The order in which n rows, in runs that have so many of each kind, lie kind by kind."""
    rows = np.arange(n).reshape(runs, -1)
    return np.concatenate([part.reshape(-1) for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)])


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

    def rows(self, name: str, start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop) of a tensor in a float type; a TuneBenchError where one is not finite in it."""
        found = self.stored(name, start, stop, dtype)
        self.check_finite(name, found)
        return found

    def stored(self, name: str, start: int, stop: int, dtype: str) -> Array:
        """Rows [start, stop) of a tensor in a float type, whatever is in them."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self._slices[name][start:stop]).astype(numpy_dtype(dtype))

    def check_finite(self, name: str, *arrays: Array) -> None:
        """Raise a TuneBenchError where what was made of a tensor has a value that is not finite."""
        for array in arrays:
            if array.dtype.kind not in "iu" and not np.isfinite(array).all():
                what = f"{name} in {self.folder} has values that are not finite in {array.dtype}"
                raise TuneBenchError(f"{what}.", "Copy it again, or choose a scheme of larger floats.")

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise a TuneBenchError that names what is missing, or has the wrong shape or type."""
        missing = [name for name in wanted if name not in self.shapes]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise TuneBenchError(f"{self.folder} lacks {', '.join(missing[:3])}{more}.", WAY_ON)
        for name, expected in wanted.items():
            shape, dtype = self.shapes[name], self._slices[name].get_dtype()
            shape = (math.prod(shape),) if len(expected) == 1 else shape
            if (shape if expected[0] else (0, *shape[1:])) != expected:
                want = list(expected) if expected[0] else f"[any, {expected[1]}]"
                raise TuneBenchError(f"{name} in {self.folder} has shape {list(shape)}, not {want}.", WAY_ON)
            if dtype not in FLOATS:
                raise TuneBenchError(f"{name} in {self.folder} is {dtype}, not {', '.join(FLOATS)}.", WAY_ON)

    def check_rows(self, matrix: Matrix) -> None:
        """Raise a TuneBenchError where the tensors stacked in a matrix have other rows than it."""
        rows = [self.shapes[source][0] for source in matrix.sources]
        if sum(rows) != matrix.n or not all(rows):
            raise TuneBenchError(f"{' + '.join(matrix.sources)} have {rows} rows, not {matrix.n} in all.", WAY_ON)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        return [_inside(folder, name) for name in _indexed(index)]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise TuneBenchError(f"no *.safetensors in {folder}.", "Name a folder with Hugging Face weights.")
    return [_inside(folder, name) for name in files]


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = stored.decode(stored.read_bytes(index, INDEX_BYTES))["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file's name is no text")
        return sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuneBenchError(f"{index} is no index of weights ({error!r}).", "Copy it again.") from None


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, or what stands for it in Hugging Face's cache; TuneBenchError for any other."""
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        path = (home / name).resolve()
        if any(path.is_relative_to(each) for each in homes) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # a name with a NUL, or links in a circle
        pass
    raise TuneBenchError(f"{name[:200]!r} is no file in {folder}.", "Copy the weights into that folder.")
