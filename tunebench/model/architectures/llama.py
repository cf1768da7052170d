"""Llama: RMSNorm, rotary embedding, grouped-query attention, gated SiLU.

q, k, v and gate, up are stacked, as MLC LLM stacks them; everything else has Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from tunebench.errors import TuneBenchError
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.model.architectures import Architecture, Matrix, ModelConfig, Positive, read_config
from tunebench.spec import Workload

Store = Callable[[str], Any]


class LlamaConfig(ModelConfig, frozen=True, kw_only=True):
    """A llama, in the names of Hugging Face's config.json."""

    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> LlamaConfig:
        """Read Hugging Face's config; a TuneBenchError names what is missing, makes no sense or is not supported."""
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise TuneBenchError(f"{source} asks for scaled rotary embedding, which is not supported.")
        if data.get("attention_bias") or data.get("mlp_bias") or data.get("hidden_act", "silu") != "silu":
            raise TuneBenchError(f"{source} asks for biases or another activation than silu: not supported.")
        theta = rope.get("rope_theta") if data.get("rope_theta") is None else data["rope_theta"]
        config = read_config(LlamaConfig, {**data, "rope_theta": theta}, source)
        if config.num_attention_heads % config.num_key_value_heads:
            raise TuneBenchError(f"{source}: num_key_value_heads does not divide num_attention_heads.")
        return config


def kernels(workload: Workload) -> ModuleType:
    """The module that writes kernels for the workload's kind of device."""
    return gpu_kernels if workload.device_kind == "gpu" else cpu_kernels


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload, store: Store, name: str) -> None:
        self.config, self.workload = config, workload
        self.qkv_proj = store(f"{name}.qkv_proj")
        self.o_proj = store(f"{name}.o_proj")

    def forward(
        self, x: Tensor, position: Tensor, rope_cos_sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the normed x; the mixed values before their projection, and the cache."""
        written = kernels(self.workload)
        b, dtype, config = self.workload.batch, self.workload.scheme.dtype, self.config
        m = int(x.shape[0]) // b
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shape = (b, m, heads, kv_heads, dim, self.workload.context, dtype)
        qkv = op.reshape(self.qkv_proj.matmul(x, dtype), (b, m, heads + 2 * kv_heads, dim))
        keys, values, q = op.tensor_ir_inplace_op(
            written.append(*shape),
            "append",
            [qkv, position, rope_cos_sin, keys, values],
            [3, 4, -1],
            [
                Tensor.placeholder(keys.shape, dtype, "keys"),
                Tensor.placeholder(values.shape, dtype, "values"),
                Tensor.placeholder((b, m, heads, dim), dtype, "q"),
            ],
        )
        mixed = op.tensor_ir_op(
            written.attention(*shape),
            "attention",
            [q, keys, values, position],
            Tensor.placeholder((b, m, heads, dim), dtype, "mixed"),
        )
        return op.reshape(mixed, (b * m, heads * dim)), keys, values


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload, store: Store, name: str) -> None:
        self.workload = workload
        self.gate_up_proj = store(f"{name}.gate_up_proj")
        self.down_proj = store(f"{name}.down_proj")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        dtype = self.workload.scheme.dtype
        return self.down_proj.matmul(self._gate(self.gate_up_proj.matmul(x, dtype)), dtype, residual)

    def _gate(self, x: Tensor) -> Tensor:
        """[rows, 2 I] -> silu(first half) * second half, [rows, I]."""
        rows, width = int(x.shape[0]), int(x.shape[1]) // 2
        body = kernels(self.workload).silu_mul(rows, width, x.dtype)
        return op.tensor_ir_op(body, "silu_mul", [x], Tensor.placeholder((rows, width), x.dtype, "gated"))


class Norm(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload) -> None:
        self.epsilon, self.dtype, self.workload = config.rms_norm_eps, workload.scheme.dtype, workload
        self.weight = nn.Parameter((config.hidden_size,), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows, width = (int(extent) for extent in x.shape)
        body = kernels(self.workload).rms_norm(rows, width, self.epsilon, self.dtype)
        return op.tensor_ir_op(body, "rms_norm", [x, self.weight], Tensor.placeholder((rows, width), self.dtype, "y"))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload, store: Store, name: str) -> None:
        self.input_layernorm = Norm(config, workload)
        self.self_attn = Attention(config, workload, store, f"{name}.self_attn")
        self.post_attention_layernorm = Norm(config, workload)
        self.mlp = MLP(config, workload, store, f"{name}.mlp")

    def forward(
        self, x: Tensor, position: Tensor, rope_cos_sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), position, rope_cos_sin, keys, values)
        x = self.self_attn.o_proj.matmul(mixed, x.dtype, x)
        return self.mlp(self.post_attention_layernorm(x), x), keys, values


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload, store: Store) -> None:
        self.embed_tokens = store("model.embed_tokens")
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([Layer(config, workload, store, f"model.layers.{i}") for i in layers])
        self.norm = Norm(config, workload)


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: LlamaConfig, workload: Workload, store: Store) -> None:
        self.config, self.workload = config, workload
        self.model = Decoder(config, workload, store)
        self.lm_head = store("lm_head")

    def step(
        self,
        tokens: Tensor,
        position: Tensor,
        last_token: Tensor,
        rope_cos_sin: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """One chunk: int32 tokens [b, m] at `position` -> float32 logits [b, vocab] of its row `last_token`."""
        b, m = (int(extent) for extent in tokens.shape)
        hidden, dtype = self.config.hidden_size, self.workload.scheme.dtype
        x = self.model.embed_tokens.take(op.reshape(tokens, (b * m,)))
        keys, values = list(keys), list(values)
        for i, layer in enumerate(self.model.layers):
            x, keys[i], values[i] = layer(x, position, rope_cos_sin, keys[i], values[i])
        if m > 1:
            x = op.tensor_ir_op(
                kernels(self.workload).last_row(b, m, hidden, dtype),
                "last_row",
                [op.reshape(x, (b, m, hidden)), last_token],
                Tensor.placeholder((b, hidden), dtype, "x"),
            )
        return self.lm_head.matmul(self.model.norm(x), "float32"), keys, values


def _matrices(config: LlamaConfig) -> dict[str, Matrix]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = {"model.embed_tokens": Matrix(config.vocab_size, hidden, ("model.embed_tokens.weight",), is_table=True)}
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        stacked = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
        matrices[f"{attention}.qkv_proj"] = Matrix(queries + 2 * keys, hidden, stacked)
        matrices[f"{attention}.o_proj"] = Matrix(hidden, queries, (f"{attention}.o_proj.weight",))
        gate_up = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        matrices[f"{mlp}.gate_up_proj"] = Matrix(2 * inner, hidden, gate_up)
        matrices[f"{mlp}.down_proj"] = Matrix(hidden, inner, (f"{mlp}.down_proj.weight",))
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return {**matrices, "lm_head": Matrix(config.vocab_size, hidden, (head,), once_a_chunk=True)}


def _vectors(config: LlamaConfig) -> dict[str, int]:
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in norms]
    return dict.fromkeys([*names, "model.norm.weight"], config.hidden_size)


ARCHITECTURES = (
    Architecture(
        name="llama",
        read=LlamaConfig.from_dict,
        matrices=_matrices,
        vectors=_vectors,
        build=LlamaForCausalLM,
        tiny=LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=128,
            max_position_embeddings=256,
        ),
    ),
)
