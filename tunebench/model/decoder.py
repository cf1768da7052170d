"""What a decoder's description computes, as a module of TVM's frontend.

Kernels that are no matrix product come from `kernels.cpu` or `kernels.gpu`, which have functions of the same names, one
for each operation of `kernels.operation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.tirx import PrimFunc

from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import delta, experts, operation
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.operation import Group, Operation
from tunebench.model.description import (
    Attention,
    Decoder,
    Experts,
    Layer,
    LinearAttention,
    Matrix,
    Mlp,
    Norm,
    Vector,
)
from tunebench.spec import Workload


class Stored(Protocol):
    """A weight matrix [n, k] in a scheme's form, a `Module` of the frontend."""

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [rows, k] -> [rows, n], plus a bias [n] and a residual [rows, n] where there are such."""
        ...

    def expert_matmul(self, x: Tensor, places: Sequence[Tensor], slots: Group, bias: Tensor | None) -> Tensor:
        """x [slots / share, k], for each slot times its expert's part -> [slots, n / experts], plus a bias [n].

        `places` are the slots' experts, or what `Group` makes of them where it says how long a tile is.
        """
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
        """One chunk: int32 tokens [b, m] at `position` -> float32 logits [b, vocab] of its row `last_token`.

        Of a workload that asks for all logits they are those of every row, [b * m, vocab].
        """
        b, m = (int(extent) for extent in tokens.shape)
        decoder = self.decoder
        x = self._stored(decoder.embedding).take(op.reshape(tokens, (b * m,)))
        if decoder.embedding_scale != 1:
            x = op.multiply(x, Tensor.from_scalar(decoder.embedding_scale, self.dtype))
        keys, values, count = list(keys), list(values), len(decoder.layers)
        for i, layer in enumerate(decoder.layers):
            held = [keys[i], *values[i::count]]  # of a quantized cache, every layer's scales are behind the values
            x, held = self._layer(layer, x, _Cache(position, last_token, rope_cos_sin, held))
            keys[i], values[i::count] = held[0], held[1:]
        hidden = decoder.embedding.k
        if m > 1 and not self.workload.all_logits:
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
        attend: Any = self._recur if isinstance(layer.attention, LinearAttention) else self._attend
        mixed, held = attend(layer.attention, self._norm(layer.attention_norm, x), cache)
        attended = self._added(layer.attention.out, mixed, layer.attention_post, x)
        before = x if layer.parallel else attended
        return self._mix(layer, self._norm(layer.mlp_norm, before), attended), held

    def _mix(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        """residual + what the layer's second half makes of the normed x."""
        if isinstance(layer.mlp, Experts):
            return self._mix_experts(layer.mlp, x, residual)
        inner = self._activated(layer.mlp, self._product(layer.mlp.up, x))
        return self._added(layer.mlp.down, inner, layer.mlp_post, residual)

    def _mix_experts(self, mixture: Experts, x: Tensor, residual: Tensor) -> Tensor:
        """residual + what each row's experts make of it, weighted."""
        rows, count, per_token = int(x.shape[0]), mixture.router.n, mixture.per_token
        if mixture.shared:
            residual = self._mix_shared(mixture.shared, mixture.shared_gate, x, residual)
        scores = self._product(mixture.router, x, out_dtype="float32")
        route = operation.Route(rows, count, per_token, mixture.normalized)
        pairs = (rows, per_token)
        chosen, weights = _call(experts.route(route), "route", [scores], (pairs, "int32"), (pairs, "float32"))
        slots = Group(rows, count, per_token, experts.grouped_by(rows, count, per_token))
        places = [chosen]
        if slots.tile:
            order, tiles = (slots.tiles * slots.tile,), (slots.tiles,)
            of_tiles = ((order, "int32"), (tiles, "int32"), ((1,), "int32"))
            places = _call(experts.group(slots), "group", places, *of_tiles)
        inner = self._activated(mixture, self._expert_product(mixture.up, x, places, slots))
        return self._combined(self._expert_product(mixture.down, inner, places, slots), weights, residual)

    def _mix_shared(self, shared: Mlp, gate: Matrix | None, x: Tensor, residual: Tensor) -> Tensor:
        """residual + what the expert of all tokens makes of the normed x, times the sigmoid of its gate."""
        inner = self._activated(shared, self._product(shared.up, x))
        if not gate:
            return self._product(shared.down, inner, residual)
        weights = op.sigmoid(self._product(gate, x, out_dtype="float32"))
        return self._combined(self._product(shared.down, inner), weights, residual)

    def _combined(self, made: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
        """residual [rows, width] + what was made of each row, [rows * times, width], by weights [rows, times]."""
        (rows, width), times = (int(extent) for extent in residual.shape), int(weights.shape[1])
        combine = experts.combine(operation.Combine(rows, times, width, self.dtype))
        return _call(combine, "combine", [made, weights, residual], ((rows, width), self.dtype))[0]

    def _expert_product(self, matrix: Matrix, x: Tensor, places: Sequence[Tensor], slots: Group) -> Tensor:
        bias = self._vector(matrix.bias) if matrix.bias else None
        return self._stored(matrix).expert_matmul(x, places, slots, bias)

    def _added(self, matrix: Matrix, x: Tensor, post: Norm | None, residual: Tensor) -> Tensor:
        """residual + the product with x, normed where `post` says so."""
        return self._norm(post, self._product(matrix, x), residual) if post else self._product(matrix, x, residual)

    def _activated(self, mlp: Mlp | Experts, x: Tensor) -> Tensor:
        rows, width = int(x.shape[0]), mlp.down.k
        kind = operation.SiluMul if mlp.gated else operation.Activate
        return self._call(kind(rows, width, self.dtype, mlp.activation), [x], (rows, width))

    def _attend(self, attention: Attention, x: Tensor, cache: _Cache) -> tuple[Tensor, list[Tensor]]:
        """The mixed values before their projection, and the cache."""
        b, dtype, heads, dim = self.workload.batch, self.dtype, attention.heads, attention.dim
        m = int(x.shape[0]) // b
        shape = (b, m, heads, attention.kv_heads, dim, self.workload.context, dtype, self.workload.kv)
        columns = (heads + 2 * attention.kv_heads) * dim
        product = qkv = self._product(attention.qkv, x)
        if attention.gated:
            split = operation.LeaveOut(b * m, columns + heads * dim, heads * dim, heads * dim, dtype)
            qkv = _call(delta.leave_out(split), split.kind, [product], ((b * m, columns), dtype))[0]
        qkv = op.reshape(qkv, (b, m, heads + 2 * attention.kv_heads, dim))
        norms = [norm for norm in (attention.query_norm, attention.key_norm) if norm]
        turns = cache.rope_cos_sin[attention.rope]
        rotary = 2 * int(turns.shape[2])
        append = operation.Append(
            *shape,
            rotary=0 if rotary == dim else rotary,
            norm=norms[0].epsilon if norms else 0.0,
        )
        weights = [self._vector(norm.weight) for norm in norms]
        given = [qkv, cache.position, turns, *weights, *cache.held]
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
        mixed = op.reshape(mixed, (b * m, heads * dim))
        if attention.gated:
            gate = operation.GateBy(b * m, heads * dim, attention.qkv.n, heads * dim, dtype)
            mixed = _call(delta.gate_by(gate), gate.kind, [mixed, product], ((b * m, heads * dim), dtype))[0]
        return mixed, held

    def _recur(self, linear: LinearAttention, x: Tensor, cache: _Cache) -> tuple[Tensor, list[Tensor]]:
        """What the heads read, gated, before its projection, and the two states."""
        b, dtype, on_gpu = self.workload.batch, self.dtype, self.workload.device_kind == "gpu"
        rows, m = int(x.shape[0]), int(x.shape[0]) // b
        heads, wide, channels = linear.value_heads, linear.value_dim, linear.channels
        last, state = cache.held
        product = self._product(linear.mixed, x)
        conv = operation.CausalConv(b, m, channels, linear.mixed.n, linear.taps, dtype)
        columns = op.reshape(product, (b, m, linear.mixed.n))
        given = [columns, self._vector(linear.convolution), cache.position, cache.last_token, last]
        last, mixed = _update(delta.causal_conv(conv, on_gpu), conv.kind, given, (b, m, channels))
        inputs = operation.DeltaInputs(rows, channels, linear.key_heads, heads, linear.key_dim, dtype)
        vectors = [self._vector(linear.slopes), self._vector(linear.offsets)]
        given = [op.reshape(mixed, (rows, channels)), self._product(linear.factors, x), *vectors]
        shapes = (rows, 2 * linear.key_heads, linear.key_dim), (rows, 2, heads)
        units, factors = _call(delta.delta_inputs(inputs), inputs.kind, given, *((each, "float32") for each in shapes))
        rule = operation.DeltaRule(b, m, linear.key_heads, heads, linear.key_dim, wide)
        given = [op.reshape(units, (b, m, *shapes[0][1:])), op.reshape(factors, (b, m, 2, heads)), mixed]
        given += [cache.position, cache.last_token, state]
        state, read = _update(delta.delta_rule(rule, on_gpu), rule.kind, given, (b, m, heads, wide))
        norm = operation.GatedNorm(rows, heads, wide, linear.mixed.n, linear.norm.epsilon, dtype)
        given = [op.reshape(read, (rows, heads, wide)), self._vector(linear.norm.weight), product]
        return _call(delta.gated_norm(norm), norm.kind, given, ((rows, heads * wide), dtype))[0], [last, state]

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
        return _call(self._kernel(computed), computed.kind, given, (shape, self.dtype))[0]

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


def _call(kernel: PrimFunc, name: str, given: Sequence[Tensor], *made: tuple[Sequence[int], str]) -> list[Tensor]:
    """What a kernel makes, of such shapes and types."""
    outputs = [Tensor.placeholder(list(shape), dtype, "out") for shape, dtype in made]
    found = op.tensor_ir_op(kernel, name, list(given), outputs if len(outputs) > 1 else outputs[0])
    return list(found) if len(outputs) > 1 else [found]


def _update(kernel: PrimFunc, name: str, given: list[Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A kernel's last argument, which it updates in place, and what it makes, float32."""
    state = Tensor.placeholder(given[-1].shape, given[-1].dtype, "state")
    out = Tensor.placeholder(list(shape), "float32", "out")
    updated, made = op.tensor_ir_inplace_op(kernel, name, given, [len(given) - 1, -1], [state, out])
    return updated, made


@dataclass(frozen=True)
class _Cache:
    """Where the chunk stands, how it is rotated, and what a layer keeps.

    `held` are keys, values and, where these are quantized, scales; of linear attention its two states.
    """

    position: Tensor
    last_token: Tensor
    rope_cos_sin: list[Tensor]
    held: list[Tensor]
