"""What decoders of llama's kind share: their config, and their blocks from the names of their weights.

q, k, v and gate, up are stacked, as MLC LLM stacks them; everything else has Hugging Face's names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tunebench.model.architectures import ACTIVATIONS, ModelConfig, Positions, Positive
from tunebench.model.description import Attention, Dealt, Decoder, Experts, Layer, Matrix, Mlp, Norm, Ropes, Vector
from tunebench.model.rope import ropes

LayerType = Literal["full_attention", "sliding_attention"]
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


class LlamaLikeConfig(ModelConfig, frozen=True, kw_only=True):
    """Of a decoder with root-mean-square norms and a gated second half."""

    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"


class WindowedConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """Of a decoder some of whose layers see a window of so many positions alone."""

    sliding_window: Positions | None = 4096
    layer_types: tuple[LayerType, ...] = ()  # left out: `usual_type` of each

    def __post_init__(self) -> None:
        LlamaLikeConfig.__post_init__(self)
        count = self.num_hidden_layers
        types = self.layer_types or tuple(self.usual_type(i) for i in range(count))
        if len(types) < count:
            raise ValueError(f"layer_types names {len(types)} layers of {count}")
        if self.sliding_window is None and "sliding_attention" in types:
            raise ValueError("layer_types has sliding_attention, and there is no sliding_window")
        msgspec.structs.force_setattr(self, "layer_types", types[:count])

    def usual_type(self, i: int) -> LayerType:
        """Of layer i where the config does not say."""
        raise NotImplementedError

    def window(self, i: int) -> int:
        """Positions that layer i sees; 0: all."""
        return (self.sliding_window or 0) if self.layer_types[i] == "sliding_attention" else 0


def decoder(config: LlamaLikeConfig, layers: Sequence[Layer], plus: float = 0.0, **more: Any) -> Decoder:
    """The model around its layers; `plus` is added to the last norm's weights, `more` is as `Decoder` has it."""
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    vocab, hidden = config.vocab_size, config.hidden_size
    return Decoder(
        embedding=Matrix("model.embed_tokens", vocab, hidden, (embedding,), is_table=True),
        layers=tuple(layers),
        head=Matrix("lm_head", vocab, hidden, (head,), once_a_chunk=True),
        **{"norm": rms_norm(config, "model.norm", plus=plus), "ropes": (one_rope(config),), **more},
    )


def one_rope(config: ModelConfig) -> Ropes:
    """The rotation that its config names."""
    return ropes(config.rope_theta, config.rotated, config.rope_scaling)


def scale(factor: float, dim: int) -> float:
    """Of the scores of heads of `dim` elements, as `Attention` has it: the usual one is not named."""
    return 0.0 if math.isclose(factor, dim**-0.5) else factor


def names(config: ModelConfig) -> list[str]:
    """Of its layers."""
    return [f"model.layers.{i}" for i in range(config.num_hidden_layers)]


def layer(config: LlamaLikeConfig, name: str, attention: Attention, mlp: Mlp | Experts) -> Layer:
    """A layer with llama's two norms."""
    return Layer(
        attention=attention,
        mlp=mlp,
        attention_norm=rms_norm(config, f"{name}.input_layernorm"),
        mlp_norm=rms_norm(config, f"{name}.post_attention_layernorm"),
    )


def attend(
    config: LlamaLikeConfig,
    at: str,
    stacked: Sequence[str] = QKV,
    bias: bool = False,
    out_bias: bool = False,
    **more: Any,
) -> Attention:
    """The attention of the layer `at`; `bias` of queries, keys and values; `more` is as `Attention` has it."""
    name, hidden, dim = f"{at}.self_attn", config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return Attention(
        qkv=matrix(f"{name}.qkv_proj", (heads + 2 * kv_heads) * dim, hidden, stacked, bias),
        out=matrix(f"{name}.o_proj", hidden, heads * dim, ("o_proj",), out_bias),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        **more,
    )


def head_norms(config: LlamaLikeConfig, at: str, plus: float = 0.0) -> dict[str, Any]:
    """The norms of each query's and each key's elements."""
    name, dim = f"{at}.self_attn", config.head_dim
    return {
        "query_norm": rms_norm(config, f"{name}.q_norm", dim, plus),
        "key_norm": rms_norm(config, f"{name}.k_norm", dim, plus),
    }


def gated_mlp(config: LlamaLikeConfig, at: str, stacked: Sequence[str] = GATE_UP, bias: bool = False) -> Mlp:
    """The gated second half of the layer `at`."""
    name, hidden, inner = f"{at}.mlp", config.hidden_size, config.intermediate_size
    return Mlp(
        up=matrix(f"{name}.gate_up_proj", 2 * inner, hidden, stacked, bias),
        down=matrix(f"{name}.down_proj", hidden, inner, ("down_proj",), bias),
        activation=ACTIVATIONS[config.hidden_act],
    )


def matrix(
    name: str, n: int, k: int, stacked: Sequence[str], bias: bool = False, dealt: tuple[Dealt, ...] = ()
) -> Matrix:
    """A matrix [n, k] of the tensors `stacked`, that stand beside it, with their biases where it has such."""
    block = name.rpartition(".")[0]
    weights, biases = (tuple(f"{block}.{part}.{what}" for part in stacked) for what in ("weight", "bias"))
    added = Vector(f"{name}.bias", n, biases, dealt=dealt) if bias else None
    return Matrix(name, n, k, weights, bias=added, dealt=dealt)


def rms_norm(config: LlamaLikeConfig, name: str, length: int = 0, plus: float = 0.0) -> Norm:
    """Of rows of `length` elements, or as wide as the model."""
    return Norm(Vector(f"{name}.weight", length or config.hidden_size, plus=plus), config.rms_norm_eps)
