"""Weights as they are, in one float type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.model.quantization import RANDOM_STD, Array, Arrays, Family, Shapes, float_product
from tunebench.spec import Scheme

if TYPE_CHECKING:
    from tvm import te
    from tvm.relax.frontend.nn import Tensor


POOL = 1 << 22  # weights


def _shapes(scheme: Scheme, n: int, k: int) -> Shapes:
    return {"weight": ((n, k), scheme.dtype)}


def _quantize(scheme: Scheme, matrix: Array) -> Arrays:
    return {"weight": matrix.astype(numpy_dtype(scheme.dtype))}


def _dequantize(scheme: Scheme, parts: Arrays) -> Array:
    return parts["weight"].astype(np.float32)


def _random(scheme: Scheme, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Normal noise: rows of a pool, from other places for each block of them, as billions of draws take minutes."""
    dtype = numpy_dtype(scheme.dtype)
    pool = (rng.standard_normal(min(n * k, POOL), np.float32) * RANDOM_STD).astype(dtype)
    weight = np.empty((n, k), dtype).reshape(-1)
    for start in range(0, weight.size, POOL):
        part = weight[start : start + POOL]
        part[...] = np.roll(pool, int(rng.integers(len(pool))))[: part.size]
    return {"weight": weight.reshape(n, k)}


def _matmul(scheme: Scheme, x: Tensor, parts: dict[str, Tensor], out_dtype: str) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    def product(a: te.Tensor, weight: te.Tensor) -> te.Tensor:
        floats = te.compute(weight.shape, lambda i, j: weight[i, j].astype("float32"), name="dequantize")
        return float_product(a, floats, out_dtype)

    return op.tensor_expr_op(product, "matmul", [x, parts["weight"]])


def _take(scheme: Scheme, tokens: Tensor, parts: dict[str, Tensor]) -> Tensor:
    from tvm import te
    from tvm.relax.frontend.nn import op

    def rows(index: te.Tensor, weight: te.Tensor) -> te.Tensor:
        return te.compute((index.shape[0], weight.shape[1]), lambda i, j: weight[index[i], j], name="take")

    return op.tensor_expr_op(rows, "take", [tokens, parts["weight"]])


def _weights(scheme: Scheme, weight: te.Tensor) -> te.Tensor:
    return weight


FAMILIES = (
    Family(
        name="none",
        schemes=(
            Scheme("q0f32", "none", "float32", 32),
            Scheme("q0f16", "none", "float16", 16),
            Scheme("q0bf16", "none", "bfloat16", 16),
        ),
        shapes=_shapes,
        quantize=_quantize,
        dequantize=_dequantize,
        random=_random,
        matmul=_matmul,
        take=_take,
        weights=_weights,
    ),
)
