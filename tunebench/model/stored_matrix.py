"""A weight matrix as parameters of a compiled function, and its products: what `decoder` multiplies with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from tunebench.kernels import cpu_experts, gpu_experts
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.operation import ExpertMatmul, Group
from tunebench.model import quantization
from tunebench.model.description import Matrix
from tunebench.spec import Scheme


class StoredMatrix(nn.Module):
    """A weight matrix in the scheme's form."""

    def __init__(self, matrix: Matrix, scheme: Scheme, device_kind: str) -> None:
        self.matrix, self.scheme, self.device = matrix, scheme, device_kind
        self.kind = quantization.kind_of(self.scheme.weight)
        shapes = self.kind.shapes(self.scheme.weight, matrix.n, matrix.k)
        self.suffixes = tuple(shapes)
        for suffix, (shape, dtype) in shapes.items():
            setattr(self, suffix, nn.Parameter(shape, dtype))

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        scheme, parts = self.scheme, self._parts()
        if self.device == "gpu":
            x, parts = quantization.in_order(scheme.weight, x, parts)
            weight = replace(scheme.weight, ordered=False)
            weights = functools.partial(self.kind.weights, weight)
            return gpu_kernels.matmul(x, parts, weights, self.matrix.n, weight, out_dtype, residual, bias)
        y = _cut(self.kind.matmul(scheme, x, parts, out_dtype), self.matrix.n)
        y = y if bias is None else y + bias
        return y if residual is None else residual + y

    def expert_matmul(self, x: Tensor, places: Sequence[Tensor], slots: Group, bias: Tensor | None) -> Tensor:
        form, (rows, k), count = self.scheme.weight, (int(extent) for extent in x.shape), self.matrix.experts
        n, share = self.matrix.n // count, slots.slots // rows
        computed = ExpertMatmul(
            slots.slots, count, slots.per_token, n, k, share, x.dtype, form, slots.tile, bias is not None
        )
        shapes = [(suffix, *shape) for suffix, shape in self.kind.shapes(form, self.matrix.n, k).items()]
        make = gpu_experts.expert_matmul if self.device == "gpu" else cpu_experts.expert_matmul
        given = [x, *places, *self._parts().values(), *([] if bias is None else [bias])]
        if self.device == "cpu" and form.kind == "integer":  # few CPUs compute in the type of the scales
            form = replace(form, dtype="float32")
        kernel = make(computed, shapes, functools.partial(self.kind.weights, form))
        return op.tensor_ir_op(kernel, "expert_matmul", given, Tensor.placeholder((slots.slots, n), x.dtype, "y"))

    def take(self, tokens: Tensor) -> Tensor:
        return _cut(self.kind.take(self.scheme, tokens, self._parts()), self.matrix.k)

    def _parts(self) -> dict[str, Tensor]:
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}


class Pieces(nn.Module):
    """A weight matrix in parts by rows, each in a form of its own."""

    def __init__(self, pieces: list[StoredMatrix]) -> None:
        self.count = len(pieces)
        for i, piece in enumerate(pieces):
            setattr(self, str(i), piece)

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        products = [getattr(self, str(i)).matmul(x, out_dtype) for i in range(self.count)]
        y = op.concat(products, dim=1)
        y = y if bias is None else op.add(y, bias)
        return y if residual is None else op.add(residual, y)

    def take(self, tokens: Tensor) -> Tensor:
        raise TypeError("tables have one source")


def _cut(x: Tensor, width: int) -> Tensor:
    """The first columns of a matrix, without those that pad it."""
    if int(x.shape[1]) == width:
        return x

    def columns(a: te.Tensor) -> te.Tensor:
        return te.compute((a.shape[0], width), lambda i, j: a[i, j], name="cut")

    return op.tensor_expr_op(columns, "cut", [x])
