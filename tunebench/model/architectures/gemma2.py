"""Gemma 2: four norms a layer, caps of scores and logits, every other layer with a window, scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunebench.model.architectures import TINY, Architecture, Extent, Heads, Positive, read_config
from tunebench.model.blocks import LayerType, WindowedConfig, attend, decoder, gated_mlp, names, rms_norm, scale
from tunebench.model.description import Attention, Decoder, Layer
from tunebench.model.rope import RopeScaling

PLUS = 1.0  # is added to the norms' weights


class Gemma2Config(WindowedConfig, frozen=True, kw_only=True):
    """A Gemma 2, in the names of Hugging Face's config.json, and with its defaults: configs leave much out."""

    hidden_size: Extent = 2304
    intermediate_size: Extent = 9216
    num_hidden_layers: int = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads = 4
    head_dim: Heads = 256
    vocab_size: Extent = 256000
    tie_word_embeddings: bool = True
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: Positive = 256
    attn_logit_softcapping: Positive | None = 50.0
    final_logit_softcapping: Positive | None = 30.0

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> Gemma2Config:
        """Read Hugging Face's config, where the activation has a name of its own."""
        return read_config(Gemma2Config, with_activation(data), source)

    def usual_type(self, i: int) -> LayerType:
        """Of layer i where the config does not say."""
        return "full_attention" if i % 2 else "sliding_attention"

    @property
    def scale(self) -> float:
        """Of the scores."""
        return scale(self.query_pre_attn_scalar**-0.5, self.head_dim)


def with_activation(data: Mapping[str, Any]) -> dict[str, Any]:
    """A Gemma's config with its activation's name where others have it: what stands there in hers means nothing."""
    return {**data, "hidden_act": data.get("hidden_activation")}


def describe(config: Gemma2Config) -> Decoder:
    """A Gemma 2's blocks and weights."""
    bias, softcap = config.attention_bias, config.attn_logit_softcapping or 0.0
    more: dict[str, Any] = {"scale": config.scale, "softcap": softcap, "bias": bias, "out_bias": bias}
    return decoder(
        config,
        [
            normed_layer(config, at, attend(config, at, window=config.window(i), **more))
            for i, at in enumerate(names(config))
        ],
        PLUS,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping or 0.0,
    )


def normed_layer(config: WindowedConfig, at: str, attention: Attention) -> Layer:
    """A layer with norms before and after each half."""
    attention_norm, attention_post, mlp_norm, mlp_post = (
        rms_norm(config, f"{at}.{name}_layernorm", plus=PLUS)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    )
    return Layer(attention, gated_mlp(config, at), attention_norm, mlp_norm, attention_post, mlp_post)


SMALL = Gemma2Config(
    **TINY,
    head_dim=32,
    query_pre_attn_scalar=24,
    sliding_window=24,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    rope_scaling=RopeScaling(rope_type="dynamic", factor=2, original_max_position_embeddings=256),
)
ARCHITECTURES = (Architecture(name="gemma2", read=Gemma2Config.from_dict, describe=describe, tiny=(SMALL,)),)
