"""Llama: root-mean-square norms, rotary embedding, grouped-query attention, a gated second half."""

from __future__ import annotations

import functools

from tunebench.model.architectures import TINY, Architecture, read_config
from tunebench.model.blocks import LlamaLikeConfig, attend, decoder, gated_mlp, layer, names
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling


class LlamaConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """A llama, in the names of Hugging Face's config.json."""

    attention_bias: bool = False
    mlp_bias: bool = False


def describe(config: LlamaConfig) -> Decoder:
    """A llama's blocks and weights."""
    bias = config.attention_bias
    return decoder(
        config,
        [
            layer(config, at, attend(config, at, bias=bias, out_bias=bias), gated_mlp(config, at, bias=config.mlp_bias))
            for at in names(config)
        ],
    )


LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=32
)
BIASES = LlamaConfig(
    **{**TINY, "vocab_size": 127, "num_hidden_layers": 1},
    head_dim=32,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    rope_scaling=LLAMA3,
)
ARCHITECTURES = (
    Architecture(
        name="llama",
        read=functools.partial(read_config, LlamaConfig),
        describe=describe,
        tiny=(LlamaConfig(**TINY, head_dim=16), BIASES),
    ),
)
