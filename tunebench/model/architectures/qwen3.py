"""Qwen3: Qwen2 with norms of each query's and key's elements in place of biases."""

from __future__ import annotations

import functools

from tunebench.model.architectures import TINY, Architecture, Heads, read_config
from tunebench.model.architectures.qwen2 import Qwen2Config
from tunebench.model.blocks import attend, decoder, gated_mlp, head_norms, layer, names
from tunebench.model.description import Decoder


class Qwen3Config(Qwen2Config, frozen=True, kw_only=True):
    """A Qwen3, in the names of Hugging Face's config.json."""

    head_dim: Heads = 128
    attention_bias: bool = False


def describe(config: Qwen3Config) -> Decoder:
    """A Qwen3's blocks and weights."""
    bias = config.attention_bias
    return decoder(
        config,
        [
            layer(
                config,
                at,
                attend(config, at, bias=bias, out_bias=bias, window=config.window(i), **head_norms(config, at)),
                gated_mlp(config, at),
            )
            for i, at in enumerate(names(config))
        ],
    )


SMALL = Qwen3Config(
    **TINY,
    head_dim=32,
    rope_theta=1e6,
    tie_word_embeddings=True,
)
ARCHITECTURES = (
    Architecture(name="qwen3", read=functools.partial(read_config, Qwen3Config), describe=describe, tiny=(SMALL,)),
)
