"""The tensors of a folder of safetensors as they lie in its files, and how a format says which it can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import COPY, FLOATS, Tensor
from tunebench.model.quantization import Array

Settings = Mapping[str, Any]
"""A config.json's `quantization_config`."""
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


class Stored:
    """Every tensor of some files by name, mapped into memory."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder
        self.arrays: dict[str, Array] = {}  # of types that NumPy can hold
        self.dtypes: dict[str, str] = {}  # as safetensors calls them
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                self._open(path)
            except (OSError, SafetensorError, ValueError) as error:
                raise TuneBenchError(f"cannot read {path} ({error}).", COPY) from None

    def _open(self, path: Path) -> None:
        with safe_open(path, framework="numpy"):  # checks that header and length agree
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length) if path.stat().st_size > 8 + length else np.zeros(0)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            self.dtypes[name], self.shapes[name] = entry["dtype"], tuple(entry["shape"])
            if entry["dtype"] in DTYPES:
                begin, end = entry["data_offsets"]
                self.arrays[name] = data[begin:end].view(DTYPES[entry["dtype"]]).reshape(self.shapes[name])

    def array(self, name: str, rank: int, *dtypes: str) -> Array:
        """A tensor of so many axes and one of the types; a TuneBenchError that names it where there is no such."""
        if name not in self.shapes:
            raise TuneBenchError(f"{self.folder} lacks {name}.", COPY)
        if self.dtypes[name] not in dtypes or len(self.shapes[name]) != rank or 0 in self.shapes[name]:
            what = f"{self.dtypes[name]} {list(self.shapes[name])}, not {' or '.join(dtypes)} of {rank} axes"
            raise TuneBenchError(f"{name} in {self.folder} is {what}.", COPY)
        return self.arrays[name]

    def floats(self, name: str, rank: int) -> Array:
        """Such a tensor of plain numbers."""
        return self.array(name, rank, *FLOATS)

    def need(self, holds: bool, name: str, words: str) -> None:
        """Raise a TuneBenchError that says of a tensor what does not fit, where it does not."""
        if not holds:
            raise TuneBenchError(f"{name} in {self.folder}: {words}.", COPY)


@dataclass(frozen=True)
class Format:
    """A way in which a quantized matrix lies in safetensors: several tensors whose names begin alike."""

    name: str  # `quant_method` in config.json
    main: tuple[str, ...]  # how the name ends of the one that marks it, the first that is there
    others: tuple[str, ...]  # how the names end of those that may be beside it
    scheme: Callable[[Settings], str]  # what rows call it
    tensor: Callable[[Stored, str, Settings], Tensor]  # (tensors, the names' beginning, settings)
    gives: str = ".weight"  # how the name ends of what they make
