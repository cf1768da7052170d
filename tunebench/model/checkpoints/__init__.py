"""Files of weights, one module a kind of file or of stored matrix: what is there, under Hugging Face's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.quantization import Array, Arrays
from tunebench.spec import WeightFormat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Types that are plain numbers, as safetensors and GGUF call them."""
COPY = "Copy it again."


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: a matrix [n, k], or a vector [n]; experts' matrices lie one below the other."""

    shape: tuple[int, ...]
    form: WeightFormat  # always N-major: layout NK
    read: Callable[[int, int], Arrays]  # rows [start, stop) as they are stored: the parts that `form` has


@dataclass(frozen=True)
class Checkpoint:
    """A file or folder of weights, opened. Reading raises a TuneBenchError that names file and tensor."""

    path: Path
    name: str  # of the model, as rows say it
    scheme: str  # what its formats are called: Q4_K_M, AWQ, ...; empty where all weights are plain floats
    config: Mapping[str, Any]  # as Hugging Face's config.json
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str] = field(default_factory=dict)  # of tensors that no format claims: what they are
    make_tokenizer: Callable[[], Tokenizer] | None = None

    def floats(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor, dequantized, float32."""
        form = self.tensors[name].form
        with np.errstate(over="ignore", invalid="ignore"):
            found = quantization.kind_of(form).dequantize(form, self.parts(name, start, stop))
        return found if found.ndim == 1 else found[:, : self.tensors[name].shape[1]]

    def parts(self, name: str, start: int, stop: int) -> Arrays:
        """The same rows as they are stored: what `quantization.kind_of(form).shapes` names, for layout NK."""
        return self.tensors[name].read(start, stop)

    def tokenizer(self) -> Tokenizer:
        """What turns text into its tokens; a TuneBenchError where there is none, or the package is missing."""
        if self.make_tokenizer is None:
            raise TuneBenchError(f"{self.path} has no tokenizer.", "Copy the model's tokenizer.json into its folder.")
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            raise TuneBenchError("the package tokenizers is missing.", "Run `pip install tokenizers`.") from None
        return self.make_tokenizer()

    def lacks(self, names: Sequence[str]) -> TuneBenchError:
        """What to raise where some tensors are not there, or are of no form that is read."""
        unread = next((name for name in names if name in self.refused), None)
        if unread is not None:
            what = f"{unread} in {self.path} is {self.refused[unread]}, not {', '.join(FLOATS)}"
            return TuneBenchError(f"{what}.", "Name weights in floats, or in a format that is read.")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return TuneBenchError(
            f"{self.path} lacks {', '.join(names[:3])}{more}.", "Name the weights of this very model."
        )

    def common_form(self) -> WeightFormat:
        """The format of most of its matrices' weights."""
        counted: Counter[WeightFormat] = Counter()
        for tensor in self.tensors.values():
            if len(tensor.shape) == 2:
                counted[tensor.form] += tensor.shape[0] * tensor.shape[1]
        if not counted:
            raise TuneBenchError(f"{self.path} holds no matrix.", "Name a folder or file with a model's weights.")
        return counted.most_common(1)[0][0]


def float_form(dtype: str) -> WeightFormat:
    """Plain numbers of a type."""
    return WeightFormat("float", 8 * numpy_dtype(dtype).itemsize, dtype)


def reordered(parts: Arrays, order: Array) -> Arrays:
    """Parts of whole rows, the rows in another order; what all rows share stays."""
    return {suffix: part if suffix == "q_order" else part[order] for suffix, part in parts.items()}


def swapped(n: int, a: int, b: int) -> Array:
    """Where each of n rows is found, so that rows that lay as [a, b, ...] come to lie as [b, a, ...]."""
    return np.arange(n).reshape(a, b, -1).swapaxes(0, 1).reshape(-1)
