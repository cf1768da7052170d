"""Qwen3-Next: a gated delta rule in most layers, gated attention in every fourth; experts, and one for all tokens."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Literal

import msgspec

from tunebench.model.architectures import ACTIVATIONS, TINY, Architecture, Count, Extent, Heads, Share, read_config
from tunebench.model.architectures.mixtral import mixture
from tunebench.model.blocks import (
    GATE_UP,
    QKV,
    LlamaLikeConfig,
    decoder,
    gated_mlp,
    head_norms,
    matrix,
    names,
    rms_norm,
)
from tunebench.model.description import Attention, Decoder, Experts, Layer, LinearAttention, Matrix, Mlp, Norm, Vector

LayerType = Literal["linear_attention", "full_attention"]
PERIOD = 4  # layers, of which the last has full attention
PLUS = 1.0  # of the weights of all norms but the gated one


class Qwen3NextConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """A Qwen3-Next, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 2
    head_dim: Heads = 256
    partial_rotary_factor: Share = 0.25
    layer_types: tuple[LayerType, ...] = ()  # left out: full attention in every fourth
    linear_conv_kernel_dim: Count = 4
    linear_key_head_dim: Heads = 128
    linear_value_head_dim: Heads = 128
    linear_num_key_heads: Heads = 16
    linear_num_value_heads: Heads = 32
    moe_intermediate_size: Extent = 512
    shared_expert_intermediate_size: Extent = 512
    num_experts: Count = 512
    num_experts_per_tok: Count = 10
    norm_topk_prob: bool = True
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        LlamaLikeConfig.__post_init__(self)
        count = self.num_hidden_layers
        types = self.layer_types or tuple(_usual_type(i) for i in range(count))
        if len(types) < count:
            raise ValueError(f"layer_types names {len(types)} layers of {count}")
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError("linear_num_key_heads does not divide linear_num_value_heads")
        msgspec.structs.force_setattr(self, "layer_types", types[:count])

    @property
    def rotated(self) -> int:
        """Elements of a head that rotary embedding turns, its first."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_mixture(self, i: int) -> bool:
        """Whether layer i has experts."""
        return i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0


def _usual_type(i: int) -> LayerType:
    return "full_attention" if i % PERIOD == PERIOD - 1 else "linear_attention"


def describe(config: Qwen3NextConfig) -> Decoder:
    """The model's blocks and weights."""
    return decoder(config, [_layer(config, i, at) for i, at in enumerate(names(config))], plus=PLUS)


def _layer(config: Qwen3NextConfig, i: int, at: str) -> Layer:
    is_linear = config.layer_types[i] == "linear_attention"
    return Layer(
        attention=_recur(config, f"{at}.linear_attn") if is_linear else _attend(config, at),
        mlp=_mix(config, f"{at}.mlp") if config.is_mixture(i) else gated_mlp(config, at),
        attention_norm=rms_norm(config, f"{at}.input_layernorm", plus=PLUS),
        mlp_norm=rms_norm(config, f"{at}.post_attention_layernorm", plus=PLUS),
    )


def _attend(config: Qwen3NextConfig, at: str) -> Attention:
    """A head's rows of q_proj are its query and then its gate."""
    name, hidden, dim = f"{at}.self_attn", config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dealt = ((heads, dim, dim), (), ())
    return Attention(
        qkv=matrix(f"{name}.qkv_proj", 2 * (heads + kv_heads) * dim, hidden, QKV, dealt=dealt),
        out=matrix(f"{name}.o_proj", hidden, heads * dim, ("o_proj",)),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        gated=True,
        **head_norms(config, at, PLUS),
    )


def _recur(config: Qwen3NextConfig, name: str) -> LinearAttention:
    """A key head's rows of in_proj_qkvz are its query, its key, its values and their gates."""
    hidden, key_heads, heads = config.hidden_size, config.linear_num_key_heads, config.linear_num_value_heads
    dim, wide, taps = config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
    share, values = heads // key_heads, heads * wide
    channels = 2 * key_heads * dim + values
    runs = (key_heads, dim, dim, share * wide, share * wide)
    return LinearAttention(
        mixed=matrix(f"{name}.in_proj_qkvz", channels + values, hidden, ("in_proj_qkvz",), dealt=(runs,)),
        factors=matrix(f"{name}.in_proj_ba", 2 * heads, hidden, ("in_proj_ba",), dealt=((key_heads, share, share),)),
        out=matrix(f"{name}.out_proj", hidden, values, ("out_proj",)),
        convolution=Vector(f"{name}.conv1d.weight", channels * taps, dtype="float32", experts=channels),
        slopes=Vector(f"{name}.A_log", heads, dtype="float32"),
        offsets=Vector(f"{name}.dt_bias", heads, dtype="float32"),
        norm=Norm(Vector(f"{name}.norm.weight", wide, dtype="float32"), config.rms_norm_eps),
        key_heads=key_heads,
        value_heads=heads,
        key_dim=dim,
        value_dim=wide,
        taps=taps,
    )


def _mix(config: Qwen3NextConfig, name: str) -> Experts:
    shape = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    chosen = mixture(config, name, ("gate_proj", "up_proj", "down_proj"), shape, config.norm_topk_prob)
    hidden, inner, shared = config.hidden_size, config.shared_expert_intermediate_size, f"{name}.shared_expert"
    of_all = Mlp(
        up=matrix(f"{shared}.gate_up_proj", 2 * inner, hidden, GATE_UP),
        down=matrix(f"{shared}.down_proj", hidden, inner, ("down_proj",)),
        activation=ACTIVATIONS[config.hidden_act],
    )
    gate = Matrix(f"{name}.shared_expert_gate", 1, hidden, (f"{name}.shared_expert_gate.weight",), stays_float=True)
    return replace(chosen, shared=of_all, shared_gate=gate)


ARCHITECTURES = (
    Architecture(
        name="qwen3_next",
        read=functools.partial(read_config, Qwen3NextConfig),
        describe=describe,
        tiny=(
            Qwen3NextConfig(
                **TINY,
                head_dim=32,
                layer_types=("linear_attention", "full_attention"),
                linear_key_head_dim=16,
                linear_value_head_dim=24,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                moe_intermediate_size=32,
                shared_expert_intermediate_size=64,
                num_experts=4,
                num_experts_per_tok=2,
            ),
        ),
    ),
)
