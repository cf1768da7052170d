"""GPT-NeoX (Pythia, Dolly): LayerNorm, biases, a layer's halves beside each other, a part of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunebench.model.architectures import ACTIVATIONS, TINY, Architecture, ModelConfig, Positive, Share, read_config
from tunebench.model.blocks import matrix, one_rope
from tunebench.model.description import Attention, Decoder, Layer, Matrix, Mlp, Norm, Vector

QUERY_KEY_VALUE = 3
RENAMED = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}


class GptNeoxConfig(ModelConfig, frozen=True, kw_only=True):
    """A GPT-NeoX, in the names of Hugging Face's config.json."""

    layer_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = False
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True
    attention_bias: bool = True
    partial_rotary_factor: Share = 0.25

    @property
    def rotated(self) -> int:
        """Elements of a head that rotary embedding turns, its first."""
        return int(self.head_dim * self.partial_rotary_factor)

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> GptNeoxConfig:
        """Read Hugging Face's config, where rotary embedding has names of its own."""
        renamed = {RENAMED[key]: value for key, value in data.items() if key in RENAMED}
        same = {key: value for key, value in data.items() if key not in RENAMED}
        return read_config(GptNeoxConfig, {**same, **renamed}, source)


def describe(config: GptNeoxConfig) -> Decoder:
    """A GPT-NeoX's blocks and weights."""
    vocab, hidden, embedding = config.vocab_size, config.hidden_size, "gpt_neox.embed_in.weight"
    head = embedding if config.tie_word_embeddings else "embed_out.weight"
    return Decoder(
        embedding=Matrix("gpt_neox.embed_in", vocab, hidden, (embedding,), is_table=True),
        layers=tuple(_layer(config, f"gpt_neox.layers.{i}") for i in range(config.num_hidden_layers)),
        norm=_norm(config, "gpt_neox.final_layer_norm"),
        head=Matrix("embed_out", vocab, hidden, (head,), once_a_chunk=True),
        ropes=(one_rope(config),),
    )


def _layer(config: GptNeoxConfig, name: str) -> Layer:
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    bias, stacked = config.attention_bias, ("query_key_value",)
    qkv = f"{name}.attention.query_key_value"
    dealt = ((heads, *[config.head_dim] * QUERY_KEY_VALUE),)
    return Layer(
        attention=Attention(
            qkv=matrix(qkv, QUERY_KEY_VALUE * hidden, hidden, stacked, bias, dealt=dealt),
            out=matrix(f"{name}.attention.dense", hidden, hidden, ("dense",), bias),
            heads=heads,
            kv_heads=heads,
            dim=config.head_dim,
        ),
        mlp=Mlp(
            up=matrix(f"{name}.mlp.dense_h_to_4h", inner, hidden, ("dense_h_to_4h",), bias=True),
            down=matrix(f"{name}.mlp.dense_4h_to_h", hidden, inner, ("dense_4h_to_h",), bias=True),
            activation=ACTIVATIONS[config.hidden_act],
            gated=False,
        ),
        attention_norm=_norm(config, f"{name}.input_layernorm"),
        mlp_norm=_norm(config, f"{name}.post_attention_layernorm"),
        parallel=config.use_parallel_residual,
    )


def _norm(config: GptNeoxConfig, name: str) -> Norm:
    weight, bias = (Vector(f"{name}.{what}", config.hidden_size) for what in ("weight", "bias"))
    return Norm(weight, config.layer_norm_eps, bias)


PYTHIA = {**TINY, "vocab_size": 127, "num_key_value_heads": 0}
IN_TURN = GptNeoxConfig(
    **{**PYTHIA, "num_hidden_layers": 1},
    use_parallel_residual=False,
    partial_rotary_factor=1.0,
    tie_word_embeddings=True,
)
ARCHITECTURES = (
    Architecture(
        name="gpt_neox",
        read=GptNeoxConfig.from_dict,
        describe=describe,
        tiny=(GptNeoxConfig(**PYTHIA), IN_TURN),
    ),
)
