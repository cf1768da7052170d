"""Files of weights, one module a kind of file: what is stored in them, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunebench.model.quantization import Array, Arrays
from tunebench.spec import WeightFormat


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: a matrix [n, k], or a vector [n]; experts' matrices lie one below the other."""

    shape: tuple[int, ...]
    form: WeightFormat  # always N-major: layout NK


class Checkpoint(Protocol):
    """A file or folder of weights, opened. Reading raises a TuneBenchError that names file and tensor."""

    path: Path
    name: str  # of the model, as rows say it
    scheme: str  # what its formats are called: Q4_K_M, AWQ, ...; empty where all weights are plain floats
    config: Mapping[str, Any]  # as Hugging Face's config.json
    tensors: Mapping[str, Tensor]

    def floats(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor, dequantized, float32."""
        ...

    def parts(self, name: str, start: int, stop: int) -> Arrays:
        """The same rows as they are stored: what `quantization.kind_of(form).shapes` names, for layout NK."""
        ...
