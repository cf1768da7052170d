"""Granite: llama with multipliers of the embedding, each half's output, the scores and the logits.

The stream that layers add to is held divided by the multiplier r of what they add, so that nothing is multiplied in
them: a norm of x / r is that of x with an epsilon divided by r^2. The last norm's weights carry the logits' divisor.
"""

from __future__ import annotations

import dataclasses
import functools

from tunebench.model.architectures import TINY, Architecture, Positive, read_config
from tunebench.model.architectures.llama import LlamaConfig
from tunebench.model.blocks import attend, decoder, gated_mlp, layer, names, rms_norm, scale
from tunebench.model.description import Decoder, Layer, Norm


class GraniteConfig(LlamaConfig, frozen=True, kw_only=True):
    """A Granite, in the names of Hugging Face's config.json."""

    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0


def describe(config: GraniteConfig) -> Decoder:
    """A Granite's blocks and weights."""
    last = rms_norm(config, "model.norm")
    last = dataclasses.replace(last, weight=dataclasses.replace(last.weight, times=1 / config.logits_scaling))
    return decoder(
        config,
        [_layer(config, at) for at in names(config)],
        norm=_scaled(config, last),
        embedding_scale=config.embedding_multiplier / config.residual_multiplier,
    )


def _layer(config: GraniteConfig, at: str) -> Layer:
    bias = config.attention_bias
    attention = attend(config, at, bias=bias, out_bias=bias, scale=scale(config.attention_multiplier, config.head_dim))
    usual = layer(config, at, attention, gated_mlp(config, at, bias=config.mlp_bias))
    return dataclasses.replace(
        usual, attention_norm=_scaled(config, usual.attention_norm), mlp_norm=_scaled(config, usual.mlp_norm)
    )


def _scaled(config: GraniteConfig, norm: Norm) -> Norm:
    """A norm of what is divided by the multiplier of each half's output."""
    return dataclasses.replace(norm, epsilon=norm.epsilon / config.residual_multiplier**2)


SMALL = GraniteConfig(
    **TINY,
    rms_norm_eps=1e-2,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.125,
    logits_scaling=8.0,
    attention_bias=True,
    tie_word_embeddings=True,
)
ARCHITECTURES = (
    Architecture(name="granite", read=functools.partial(read_config, GraniteConfig), describe=describe, tiny=(SMALL,)),
)
