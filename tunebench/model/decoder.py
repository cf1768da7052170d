"""What a decoder's description computes, as a module of TVM's frontend.

Kernels that are no matrix product come from `kernels.cpu` or `kernels.gpu`, which have functions of the same names, one
for each operation of `kernels.operation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.tirx import PrimFunc

from tunebench.errors import TuneBenchError
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import operation
from tunebench.kernels.operation import Operation
from tunebench.model.description import Attention, Decoder, Experts, Layer, Matrix, Mlp, Norm, Vector
from tunebench.spec import Workload


class Stored(Protocol):
    """A weight matrix [n, k] in a scheme's form, a `Module` of the frontend."""

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [rows, k] -> [rows, n], plus a bias [n] and a residual [rows, n] where there are such."""
        ...

    def take(self, tokens: Tensor) -> Tensor:
        """Row numbers, int32 [count] -> [count, k]."""
        ...


class DecoderModule(nn.Module):
    """A decoder with its parameters, each under its weight's own name."""

    def __init__(self, decoder: Decoder, workload: Workload, store: Callable[[Matrix], Stored]) -> None:
        self.decoder, self.workload = decoder, workload
        self.dtype = workload.scheme.dtype
        self.written: Any = gpu_kernels if workload.device_kind == "gpu" else cpu_kernels
        for matrix in decoder.matrices().values():
            setattr(self, matrix.name, store(matrix))
        for vector in decoder.vectors().values():
            setattr(self, vector.name, nn.Parameter((vector.length,), vector.dtype or self.dtype))

    def step(
        self,
        tokens: Tensor,
        position: Tensor,
        last_token: Tensor,
        rope_cos_sin: list[Tensor],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One chunk: int32 tokens [b, m] at `position` -> float32 logits [b, vocab] of its row `last_token`."""
        b, m = (int(extent) for extent in tokens.shape)
        decoder = self.decoder
        x = self._stored(decoder.embedding).take(op.reshape(tokens, (b * m,)))
        if decoder.embedding_scale != 1:
            x = op.multiply(x, Tensor.from_scalar(decoder.embedding_scale, self.dtype))
        keys, values, count = list(keys), list(values), len(decoder.layers)
        for i, layer in enumerate(decoder.layers):
            held = [keys[i], *values[i::count]]  # of a quantized cache, every layer's scales are behind the values
            x, held = self._layer(layer, x, _Cache(position, rope_cos_sin[layer.attention.rope], held))
            keys[i], values[i::count] = held[0], held[1:]
        hidden = decoder.embedding.k
        if m > 1:
            x = self._call(
                operation.LastRow(b, m, hidden, self.dtype), [op.reshape(x, (b, m, hidden)), last_token], (b, hidden)
            )
        logits = self._product(decoder.head, self._norm(decoder.norm, x), out_dtype="float32")
        if decoder.logits_softcap:
            cap = Tensor.from_scalar(decoder.logits_softcap, "float32")
            logits = op.multiply(op.tanh(op.divide(logits, cap)), cap)
        return logits, keys, values

    def _layer(self, layer: Layer, x: Tensor, cache: _Cache) -> tuple[Tensor, list[Tensor]]:
        """What comes out, and the cache."""
        mixed, held = self._attend(layer.attention, self._norm(layer.attention_norm, x), cache)
        attended = self._added(layer.attention.out, mixed, layer.attention_post, x)
        before = x if layer.parallel else attended
        return self._mix(layer, self._norm(layer.mlp_norm, before), attended), held

    def _mix(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        """residual + what the layer's second half makes of the normed x."""
        if isinstance(layer.mlp, Experts):
            raise TuneBenchError("mixtures of experts are not supported.")
        inner = self._activated(layer.mlp, self._product(layer.mlp.up, x))
        return self._added(layer.mlp.down, inner, layer.mlp_post, residual)

    def _added(self, matrix: Matrix, x: Tensor, post: Norm | None, residual: Tensor) -> Tensor:
        """residual + the product with x, normed where `post` says so."""
        return self._norm(post, self._product(matrix, x), residual) if post else self._product(matrix, x, residual)

    def _activated(self, mlp: Mlp, x: Tensor) -> Tensor:
        rows, width = int(x.shape[0]), mlp.down.k
        kind = operation.SiluMul if mlp.gated else operation.Activate
        return self._call(kind(rows, width, self.dtype, mlp.activation), [x], (rows, width))

    def _attend(self, attention: Attention, x: Tensor, cache: _Cache) -> tuple[Tensor, list[Tensor]]:
        """The mixed values before their projection, and the cache."""
        b, dtype, heads, dim = self.workload.batch, self.dtype, attention.heads, attention.dim
        m = int(x.shape[0]) // b
        shape = (b, m, heads, attention.kv_heads, dim, self.workload.context, dtype, self.workload.kv)
        qkv = op.reshape(self._product(attention.qkv, x), (b, m, heads + 2 * attention.kv_heads, dim))
        norms = [norm for norm in (attention.query_norm, attention.key_norm) if norm]
        rotary = 2 * int(cache.rope_cos_sin.shape[2])
        append = operation.Append(
            *shape, rotary=0 if rotary == dim else rotary, norm=norms[0].epsilon if norms else 0.0
        )
        weights = [self._vector(norm.weight) for norm in norms]
        given = [qkv, cache.position, cache.rope_cos_sin, *weights, *cache.held]
        *held, q = op.tensor_ir_inplace_op(
            self._kernel(append),
            "append",
            given,
            [*range(len(given) - len(cache.held), len(given)), -1],
            [
                *(Tensor.placeholder(each.shape, each.dtype, "held") for each in cache.held),
                Tensor.placeholder((b, m, heads, dim), dtype, "q"),
            ],
        )
        keys, values, *scales = held
        computed = operation.Attention(
            *shape,
            scale=attention.scale,
            softcap=attention.softcap,
            window=attention.window if attention.window < self.workload.context else 0,
            sinks=attention.sinks is not None,
        )
        sinks = [self._vector(attention.sinks)] if attention.sinks else []
        mixed = self._call(computed, [q, keys, values, cache.position, *sinks, *scales], (b, m, heads, dim))
        return op.reshape(mixed, (b * m, heads * dim)), held

    def _norm(self, norm: Norm, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The normed x, added to `residual` where there is one."""
        rows, width = (int(extent) for extent in x.shape)
        given = [x, self._vector(norm.weight)]
        if norm.bias:
            computed: Operation = operation.LayerNorm(rows, width, norm.epsilon, self.dtype)
            given.append(self._vector(norm.bias))
        else:
            computed = operation.RmsNorm(rows, width, norm.epsilon, self.dtype, residual is not None)
            given += [residual] if residual is not None else []
        return self._call(computed, given, (rows, width))

    def _call(self, computed: Operation, given: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The result, of the activations' type, of an operation's kernel."""
        return op.tensor_ir_op(
            self._kernel(computed), computed.kind, list(given), Tensor.placeholder(list(shape), self.dtype, "out")
        )

    def _kernel(self, computed: Operation) -> PrimFunc:
        kernel: PrimFunc = getattr(self.written, computed.kind)(computed)
        return kernel

    def _product(
        self, matrix: Matrix, x: Tensor, residual: Tensor | None = None, out_dtype: str | None = None
    ) -> Tensor:
        """The matrix times x, with its bias, added to `residual` where there is one."""
        bias = self._vector(matrix.bias) if matrix.bias else None
        return self._stored(matrix).matmul(x, out_dtype or self.dtype, residual, bias)

    def _stored(self, matrix: Matrix) -> Stored:
        found: Stored = getattr(self, matrix.name)
        return found

    def _vector(self, vector: Vector) -> Tensor:
        return getattr(self, vector.name)


class _Cache:
    """Where a layer's keys, values and, where they are quantized, scales are, and where the chunk stands."""

    def __init__(self, position: Tensor, rope_cos_sin: Tensor, held: list[Tensor]) -> None:
        self.position, self.rope_cos_sin, self.held = position, rope_cos_sin, held
