"""What can be done with weight formats, one module a kind: how a matrix is stored, and the kernels that read it.

A module lists its `KINDS`, each with the schemes that there are. TVM is imported only inside the functions that build
kernels, so that the schemes can be listed, and weights packed, without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunebench import registry
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.spec import Scheme, WeightFormat

if TYPE_CHECKING:
    from tvm import te
    from tvm.relax.frontend.nn import Tensor

RANDOM_STD = 0.02  # of made-up weights, as of transformers' initialisation
ORDER = "q_order"

Array = np.ndarray
Arrays = dict[str, np.ndarray]
"""A stored matrix by the suffix of each part's name, e.g. {"q_weight": ..., "q_scale": ...}."""
Body = Callable[..., "te.Tensor"]
"""A kernel's computation: input tensors -> output tensor."""
Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each part."""


class Quantize(Protocol):
    """float32 [N, K] -> its parts, with the least squared error that a search finds.

    `importance` [K] weighs the errors of each input's weights: the mean square of its activations.
    """

    def __call__(self, form: WeightFormat, matrix: Array, importance: Array | None = None) -> Arrays: ...


@dataclass(frozen=True)
class Kind:
    """What can be done with a matrix of N outputs and K inputs in a weight format of one kind.

    What is stored may be padded: to whole groups of inputs, and to whole tiles of outputs. What comes out of it then
    has more columns or rows than the matrix, at its end, and whoever knows N and K leaves them away.
    """

    name: str  # as formats name their kind
    schemes: tuple[Scheme, ...]
    shapes: Callable[[WeightFormat, int, int], Shapes]  # (format, N, K)
    quantize: Quantize
    dequantize: Callable[[WeightFormat, Arrays], Array]  # the parts -> float32 [N, K]
    laid_out: Callable[[WeightFormat, Arrays], Arrays]  # parts in layout NK -> as the format's layout has them
    random: Callable[[WeightFormat, int, int, np.random.Generator], Arrays]  # made directly in stored form
    matmul: Callable[[Scheme, Tensor, dict[str, Tensor], str], Tensor]  # (x [M, K], parts, out dtype) -> [M, N]
    take: Callable[[Scheme, Tensor, dict[str, Tensor]], Tensor]  # (int32 [n], parts) -> rows [n, K]
    weights: Callable[..., te.Tensor]  # (format, one te placeholder a part) -> [N, K], a float type


def kinds() -> dict[str, Kind]:
    """Every kind by name."""
    return registry.load(__name__, "KINDS", Kind)


def kind_of(weight: WeightFormat) -> Kind:
    """What can be done with a format."""
    return kinds()[weight.kind]


def schemes() -> dict[str, Scheme]:
    """Every scheme by name."""
    return {scheme.name: scheme for kind in kinds().values() for scheme in kind.schemes}


def by_rows(weight: WeightFormat) -> WeightFormat:
    """The same numbers in layout NK, as checkpoints have them."""
    return replace(weight, layout="NK", packing="planes" if weight.packing == "planes" else "in_order")


def stored_bits(weight: WeightFormat) -> float:
    """Of memory that a weight takes, with its share of what its group has."""
    n, k = 128, 128 * 3 * 5 * 8
    shapes = kind_of(weight).shapes(weight, n, k).values()
    return sum(8 * math.prod(shape) * numpy_dtype(dtype).itemsize for shape, dtype in shapes) / (n * k)


def check(scheme: Scheme, n: int, k: int, name: str) -> None:
    """Raise a TuneBenchError where a matrix [n, k] cannot be multiplied in `scheme`."""
    group = scheme.weight.byte_group
    if scheme.activations != "float" and k % group:
        raise TuneBenchError(
            f"{name} has {k} inputs, which {scheme.name}'s groups of {group} do not divide.",
            "Choose a scheme of float activations for this model.",
        )


def in_order(weight: WeightFormat, x: Tensor, parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """x [M, K] with its columns in the order in which the weights are stored, and the parts without that order."""
    from tvm import te
    from tvm.relax.frontend.nn import op

    rest = {name: part for name, part in parts.items() if name != ORDER}
    if not weight.ordered:
        return x, rest

    def gather(a: te.Tensor, order: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda i, j: a[i, order[j]], name="gather")

    return op.tensor_expr_op(gather, "gather", [x, parts[ORDER]]), rest


def float_product(x: te.Tensor, weight: te.Tensor, out_dtype: str) -> te.Tensor:
    """x [M, K] @ weight [N, K].T in float32, as stages `x_float`, `matmul` and, for another type, `out`."""
    from tvm import te

    (m, k), n = x.shape, weight.shape[0]
    axis = te.reduce_axis((0, k), name="k")
    floats = te.compute((m, k), lambda i, j: x[i, j].astype("float32"), name="x_float")
    y = te.compute((m, n), lambda i, j: te.sum(floats[i, axis] * weight[j, axis], axis=axis), name="matmul")
    return y if out_dtype == "float32" else te.compute((m, n), lambda i, j: y[i, j].astype(out_dtype), name="out")
