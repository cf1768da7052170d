"""Llama: RMSNorm, rotary embedding, grouped-query attention, gated SiLU.

q, k, v and gate, up are stacked, as MLC LLM stacks them; everything else has Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunebench.errors import TuneBenchError
from tunebench.model.architectures import Architecture, ModelConfig, Positive, read_config
from tunebench.model.description import Attention, Decoder, Layer, Matrix, Mlp, Norm, Rope, Ropes, Vector


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


def describe(config: LlamaConfig) -> Decoder:
    """A llama's blocks and weights."""
    hidden, vocab = config.hidden_size, config.vocab_size
    half = config.head_dim // 2
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return Decoder(
        embedding=Matrix("model.embed_tokens", vocab, hidden, ("model.embed_tokens.weight",), is_table=True),
        layers=tuple(_layer(config, f"model.layers.{i}") for i in range(config.num_hidden_layers)),
        norm=_norm(config, "model.norm"),
        head=Matrix("lm_head", vocab, hidden, (head,), once_a_chunk=True),
        ropes=(Ropes(Rope(tuple(config.rope_theta ** -(i / half) for i in range(half)))),),
    )


def _layer(config: LlamaConfig, name: str) -> Layer:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    stacked = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
    gate_up = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    return Layer(
        attention=Attention(
            qkv=Matrix(f"{attention}.qkv_proj", (heads + 2 * kv_heads) * dim, hidden, stacked),
            out=Matrix(f"{attention}.o_proj", hidden, heads * dim, (f"{attention}.o_proj.weight",)),
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
        ),
        mlp=Mlp(
            up=Matrix(f"{mlp}.gate_up_proj", 2 * inner, hidden, gate_up),
            down=Matrix(f"{mlp}.down_proj", hidden, inner, (f"{mlp}.down_proj.weight",)),
        ),
        attention_norm=_norm(config, f"{name}.input_layernorm"),
        mlp_norm=_norm(config, f"{name}.post_attention_layernorm"),
    )


def _norm(config: LlamaConfig, name: str) -> Norm:
    return Norm(Vector(f"{name}.weight", config.hidden_size), config.rms_norm_eps)


ARCHITECTURES = (
    Architecture(
        name="llama",
        read=LlamaConfig.from_dict,
        describe=describe,
        tiny=(
            LlamaConfig(
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
    ),
)
