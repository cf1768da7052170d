"""Phi 3 and 3.5: llama whose projections are stored fused; rotary embedding of a part of each head, and a long one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunebench.errors import TuneBenchError
from tunebench.model.architectures import TINY, Architecture, Positions, Share, read_config
from tunebench.model.blocks import LlamaLikeConfig, attend, decoder, gated_mlp, layer, names
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling


class Phi3Config(LlamaLikeConfig, frozen=True, kw_only=True):
    """A Phi 3, in the names of Hugging Face's config.json."""

    sliding_window: Positions | None = None
    partial_rotary_factor: Share = 1.0

    @property
    def rotated(self) -> int:
        """Elements of a head that rotary embedding turns, its first."""
        return int(self.head_dim * self.partial_rotary_factor)

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> Phi3Config:
        """Read Hugging Face's config, whose long rotary embedding had other names, and no other kind is known."""
        config = read_config(Phi3Config, {"original_max_position_embeddings": 4096, **data}, source)
        if config.rope_scaling and config.rope_scaling.rope_type != "longrope":
            raise TuneBenchError(
                f"{source}: rope_type {config.rope_scaling.rope_type!r} is not supported for phi3.",
                "There are default, longrope.",
            )
        return config


def describe(config: Phi3Config) -> Decoder:
    """A Phi 3's blocks and weights."""
    window = config.sliding_window or 0
    return decoder(
        config,
        [
            layer(
                config,
                at,
                attend(config, at, ("qkv_proj",), window=window),
                gated_mlp(config, at, ("gate_up_proj",)),
            )
            for at in names(config)
        ],
    )


def _tiny(original: int, partial: float) -> Phi3Config:
    """Trained to so many positions at first."""
    turns = int(16 * partial) // 2
    return Phi3Config(
        **{**TINY, "num_hidden_layers": 1},
        sliding_window=40,
        partial_rotary_factor=partial,
        rms_norm_eps=1e-5,
        rope_scaling=RopeScaling(
            rope_type="longrope",
            factor=256 / original,
            original_max_position_embeddings=original,
            short_factor=tuple(1 + 0.1 * i for i in range(turns)),
            long_factor=tuple(2 + 0.5 * i for i in range(turns)),
        ),
    )


ARCHITECTURES = (
    Architecture(name="phi3", read=Phi3Config.from_dict, describe=describe, tiny=(_tiny(32, 1.0), _tiny(128, 0.75))),
)
