"""Qwen2 and 2.5: llama with biases of queries, keys and values; later layers may see a window."""

from __future__ import annotations

import functools

import msgspec

from tunebench.model.architectures import TINY, Architecture, Heads, read_config
from tunebench.model.blocks import LayerType, WindowedConfig, attend, decoder, gated_mlp, layer, names
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling


class Qwen2Config(WindowedConfig, frozen=True, kw_only=True):
    """A Qwen2, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 32
    use_sliding_window: bool = False
    max_window_layers: int = 28  # the first so many layers see all

    def __post_init__(self) -> None:
        if not self.use_sliding_window:
            msgspec.structs.force_setattr(self, "sliding_window", None)
        WindowedConfig.__post_init__(self)

    def usual_type(self, i: int) -> LayerType:
        """Of layer i where the config does not say."""
        return "sliding_attention" if self.sliding_window and i >= self.max_window_layers else "full_attention"


def describe(config: Qwen2Config) -> Decoder:
    """A Qwen2's blocks and weights."""
    return decoder(
        config,
        [
            layer(config, at, attend(config, at, bias=True, window=config.window(i)), gated_mlp(config, at))
            for i, at in enumerate(names(config))
        ],
    )


SMALL = Qwen2Config(
    **{**TINY, "vocab_size": 127},
    use_sliding_window=True,
    sliding_window=24,
    max_window_layers=1,
    rope_scaling=RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=64),
)
ARCHITECTURES = (
    Architecture(name="qwen2", read=functools.partial(read_config, Qwen2Config), describe=describe, tiny=(SMALL,)),
)
