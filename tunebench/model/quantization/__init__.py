"""What can be done with weight formats, one module a kind: how a matrix is stored, and the kernels that read it.

A module lists its `KINDS`, each with the schemes that there are. TVM is imported only inside the functions that build
kernels, so that the schemes can be listed, and weights packed, without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunebench import registry
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.spec import Scheme, WeightFormat

if TYPE_CHECKING:
    from tvm import te
    from tvm.relax.frontend.nn import Tensor

RANDOM_STD = 0.02  # of made-up weights, as of transformers' initialisation

Array = np.ndarray
Arrays = dict[str, np.ndarray]
"""A stored matrix by the suffix of each part's name, e.g. {"q_weight": ..., "q_scale": ...}."""
Body = Callable[..., "te.Tensor"]
"""A kernel's computation: input tensors -> output tensor."""
Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each part."""


@dataclass(frozen=True)
class Kind:
    """What can be done with a matrix of N outputs and K inputs in a weight format of one kind."""

    name: str  # as formats name their kind
    schemes: tuple[Scheme, ...]
    shapes: Callable[[WeightFormat, int, int], Shapes]  # (format, N, K)
    quantize: Callable[[WeightFormat, Array], Arrays]  # float32 [N, K] -> its parts
    dequantize: Callable[[WeightFormat, Arrays], Array]  # the parts -> float32 [N, K]
    random: Callable[[WeightFormat, int, int, np.random.Generator], Arrays]  # made directly in stored form
    matmul: Callable[[Scheme, Tensor, dict[str, Tensor], str], Tensor]  # (x [M, K], parts, out dtype) -> [M, N]
    take: Callable[[Scheme, Tensor, dict[str, Tensor]], Tensor]  # (int32 [n], parts) -> rows [n, K]
    weights: Callable[..., te.Tensor]  # (format, one te placeholder a part) -> [N, K] in the format's dtype


def kinds() -> dict[str, Kind]:
    """Every kind by name."""
    return registry.load(__name__, "KINDS", Kind)


def kind_of(weight: WeightFormat) -> Kind:
    """What can be done with a format."""
    return kinds()[weight.kind]


def schemes() -> dict[str, Scheme]:
    """Every scheme by name."""
    return {scheme.name: scheme for kind in kinds().values() for scheme in kind.schemes}


def stored_bits(weight: WeightFormat) -> float:
    """Of memory that a weight takes, with its share of what its group has."""
    n, k = 16, 16 * max(weight.group, 1)
    shapes = kind_of(weight).shapes(weight, n, k).values()
    return sum(8 * math.prod(shape) * numpy_dtype(dtype).itemsize for shape, dtype in shapes) / (n * k)


def check(scheme: Scheme, n: int, k: int, name: str) -> None:
    """Raise a TuneBenchError where a matrix [n, k] cannot be stored in `scheme`."""
    if scheme.weight.group and k % scheme.weight.group:
        raise TuneBenchError(
            f"{name} has {k} inputs, which {scheme.name}'s groups of {scheme.weight.group} do not divide.",
            "Choose q0f16 or q0f32 for this model.",
        )
    if scheme.weight.layout == "N16" and n % 16:
        raise TuneBenchError(
            f"{name} has {n} outputs, which {scheme.name}'s tiles of 16 do not divide.", "Choose q4f16_1 or q8f16_1."
        )


def float_product(x: te.Tensor, weight: te.Tensor, out_dtype: str) -> te.Tensor:
    """x [M, K] @ weight [N, K].T in float32, as stages `x_float`, `matmul` and, for another type, `out`."""
    from tvm import te

    (m, k), n = x.shape, weight.shape[0]
    axis = te.reduce_axis((0, k), name="k")
    floats = te.compute((m, k), lambda i, j: x[i, j].astype("float32"), name="x_float")
    y = te.compute((m, n), lambda i, j: te.sum(floats[i, axis] * weight[j, axis], axis=axis), name="matmul")
    return y if out_dtype == "float32" else te.compute((m, n), lambda i, j: y[i, j].astype(out_dtype), name="out")
