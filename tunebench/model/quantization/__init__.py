"""Families of quantization schemes, one module each: how a matrix is stored, and the kernels that read it.

A module lists its `FAMILIES`. TVM is imported only inside the functions that build kernels, so that the
schemes can be listed, and weights packed, without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunebench import registry
from tunebench.errors import TuneBenchError
from tunebench.spec import Scheme

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
class Family:
    """One way to store a matrix of N outputs and K inputs."""

    name: str
    schemes: tuple[Scheme, ...]
    shapes: Callable[[Scheme, int, int], Shapes]  # (scheme, N, K)
    quantize: Callable[[Scheme, Array], Arrays]  # float32 [N, K] -> its parts
    dequantize: Callable[[Scheme, Arrays], Array]  # the parts -> float32 [N, K]
    random: Callable[[Scheme, int, int, np.random.Generator], Arrays]  # made directly in stored form
    matmul: Callable[[Scheme, Tensor, dict[str, Tensor], str], Tensor]  # (x [M, K], parts, out dtype) -> [M, N]
    take: Callable[[Scheme, Tensor, dict[str, Tensor]], Tensor]  # (int32 [n], parts) -> rows [n, K]
    weights: Callable[..., te.Tensor]  # (scheme, one te placeholder a part) -> [N, K] in the scheme's dtype


def families() -> dict[str, Family]:
    """Every family by name."""
    return registry.load(__name__, "FAMILIES", Family)


def schemes() -> dict[str, Scheme]:
    """Every scheme by name."""
    return {scheme.name: scheme for family in families().values() for scheme in family.schemes}


def check(scheme: Scheme, n: int, k: int, name: str) -> None:
    """Raise a TuneBenchError where a matrix [n, k] cannot be stored in `scheme`."""
    if scheme.group_size and k % scheme.group_size:
        raise TuneBenchError(
            f"{name} has {k} inputs, which {scheme.name}'s groups of {scheme.group_size} do not divide.",
            "Choose q0f16 or q0f32 for this model.",
        )
    if scheme.layout == "N16" and n % 16:
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
