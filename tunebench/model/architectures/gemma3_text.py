"""Gemma 3: Gemma 2 with norms of queries and keys, and a rotation of their own for layers with a window.

The config of a model which takes pictures, `gemma3`, has it inside as `text_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunebench.errors import TuneBenchError
from tunebench.model.architectures import TINY, Architecture, Base, Extent, Layers, Positive, read_config
from tunebench.model.architectures.gemma2 import PLUS, Gemma2Config, normed_layer, with_activation
from tunebench.model.blocks import LayerType, attend, decoder, head_norms, names, one_rope
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling, as_object, read_rope, ropes

LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Gemma3Config(Gemma2Config, frozen=True, kw_only=True):
    """A Gemma 3, in the names of Hugging Face's config.json."""

    vocab_size: Extent = 262208
    rope_theta: Base = 1e6
    attn_logit_softcapping: None = None
    final_logit_softcapping: Positive | None = None
    rope_local_base_freq: Base = 1e4  # of layers with a window
    sliding_window_pattern: Layers = 6  # every such layer sees all

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> Gemma3Config:
        """Read Hugging Face's config: `rope_parameters` are by the type of a layer, where earlier keys were for one."""
        by_type = as_object(data.get("rope_parameters"), source)
        both = [as_object(each, source) for each in (by_type.get(GLOBAL), data.get("rope_scaling"))]
        local = read_rope(by_type.get(LOCAL), {"rope_theta": data.get("rope_local_base_freq")}, 1e4, source)
        if local["rope_scaling"]:
            raise TuneBenchError(
                f"{source}: {LOCAL} has a scaled rope, which is not supported.", "Choose another model."
            )
        changed = {
            "rope_parameters": {**both[0], **both[1]},
            "rope_scaling": None,
            "rope_local_base_freq": local["rope_theta"],
        }
        return read_config(Gemma3Config, {**with_activation(data), **changed}, source)

    def usual_type(self, i: int) -> LayerType:
        """Of layer i where the config does not say."""
        return "sliding_attention" if (i + 1) % self.sliding_window_pattern else "full_attention"


def describe(config: Gemma3Config) -> Decoder:
    """A Gemma 3's blocks and weights."""
    bias = config.attention_bias
    more: dict[str, Any] = {"scale": config.scale, "bias": bias, "out_bias": bias}
    local = [config.layer_types[i] == LOCAL for i in range(config.num_hidden_layers)]
    return decoder(
        config,
        [
            normed_layer(
                config,
                at,
                attend(config, at, window=config.window(i), rope=int(local[i]), **head_norms(config, at, PLUS), **more),
            )
            for i, at in enumerate(names(config))
        ],
        PLUS,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=config.final_logit_softcapping or 0.0,
        ropes=(one_rope(config), ropes(config.rope_local_base_freq, config.head_dim)),
    )


SMALL = Gemma3Config(
    **TINY,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=24,
    sliding_window_pattern=2,
    rope_scaling=RopeScaling(rope_type="linear", factor=8),
)
ARCHITECTURES = (Architecture(name="gemma3_text", read=Gemma3Config.from_dict, describe=describe, tiny=(SMALL,)),)
