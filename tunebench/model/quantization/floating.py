"""Weights as they are, in one float type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunebench.dtypes import numpy_dtype
from tunebench.model.quantization import RANDOM_STD, Array, Arrays, Kind, Shapes, float_product
from tunebench.spec import Scheme, WeightFormat

if TYPE_CHECKING:
    from tvm import te
    from tvm.relax.frontend.nn import Tensor


POOL = 1 << 22  # weights


def _shapes(form: WeightFormat, n: int, k: int) -> Shapes:
    if form.group:
        raise ValueError(f"floats in groups have no form here: {form}")
    return {"weight": ((n, k), form.dtype)}


def _quantize(form: WeightFormat, matrix: Array, importance: Array | None = None) -> Arrays:
    return {"weight": matrix.astype(numpy_dtype(form.dtype))}


def _dequantize(form: WeightFormat, parts: Arrays) -> Array:
    return parts["weight"].astype(np.float32)


def _random(form: WeightFormat, n: int, k: int, rng: np.random.Generator) -> Arrays:
    """Normal noise: rows of a pool, from other places for each block of them, as billions of draws take minutes."""
    dtype = numpy_dtype(form.dtype)
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


def _weights(form: WeightFormat, weight: te.Tensor) -> te.Tensor:
    return weight


KINDS = (
    Kind(
        name="float",
        schemes=(
            Scheme("q0f32", WeightFormat("float", 32, "float32"), "float32"),
            Scheme("q0f16", WeightFormat("float", 16, "float16"), "float16"),
            Scheme("q0bf16", WeightFormat("float", 16, "bfloat16"), "bfloat16"),
        ),
        shapes=_shapes,
        quantize=_quantize,
        dequantize=_dequantize,
        laid_out=lambda form, parts: parts,
        random=_random,
        matmul=_matmul,
        take=_take,
        weights=_weights,
    ),
)
