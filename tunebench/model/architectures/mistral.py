"""Mistral: llama, each token of which may see a window of positions alone."""

from __future__ import annotations

import functools

from tunebench.model.architectures import TINY, Architecture, Heads, Positions, read_config
from tunebench.model.blocks import LlamaLikeConfig, attend, decoder, gated_mlp, layer, names
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling


class MistralConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """A Mistral, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 8
    sliding_window: Positions | None = 4096


def describe(config: MistralConfig) -> Decoder:
    """A Mistral's blocks and weights."""
    window = config.sliding_window or 0
    return decoder(
        config,
        [layer(config, at, attend(config, at, window=window), gated_mlp(config, at)) for at in names(config)],
    )


SMALL = MistralConfig(
    **{**TINY, "num_hidden_layers": 1, "num_key_value_heads": 1},
    sliding_window=24,
    rope_scaling=RopeScaling(rope_type="linear", factor=2),
)
ARCHITECTURES = (
    Architecture(name="mistral", read=functools.partial(read_config, MistralConfig), describe=describe, tiny=(SMALL,)),
)
