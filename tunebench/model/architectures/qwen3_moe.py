"""Qwen3 whose gated second halves are mixtures of experts, in all layers or in some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from tunebench.model.architectures import TINY, Architecture, Count, Extent, Heads, Positions, read_config
from tunebench.model.architectures.mixtral import mixture
from tunebench.model.blocks import LlamaLikeConfig, attend, decoder, gated_mlp, head_norms, layer, names
from tunebench.model.description import Decoder, Experts, Mlp


class Qwen3MoeConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """A Qwen3 with experts, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 4
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Positions | None = 4096
    moe_intermediate_size: Extent = 768
    num_experts: Count = 128
    num_experts_per_tok: Count = 8
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] = ()

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> Qwen3MoeConfig:
        """Read Hugging Face's config, which may name the experts as Mixtral does."""
        data = dict(data)
        named = data.pop("num_local_experts", None)
        return read_config(Qwen3MoeConfig, {"num_experts": named, **data}, source)

    def is_mixture(self, i: int) -> bool:
        """Whether layer i has experts."""
        return i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0


def describe(config: Qwen3MoeConfig) -> Decoder:
    """The model's blocks and weights."""
    bias = config.attention_bias
    window = (config.sliding_window or 0) if config.use_sliding_window else 0
    return decoder(
        config,
        [
            layer(
                config,
                at,
                attend(config, at, bias=bias, out_bias=bias, window=window, **head_norms(config, at)),
                _second_half(config, i, at),
            )
            for i, at in enumerate(names(config))
        ],
    )


def _second_half(config: Qwen3MoeConfig, i: int, at: str) -> Mlp | Experts:
    if not config.is_mixture(i):
        return gated_mlp(config, at)
    shape = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    return mixture(config, f"{at}.mlp", ("gate_proj", "up_proj", "down_proj"), shape, config.norm_topk_prob)


SMALL = Qwen3MoeConfig(
    **{**TINY, "num_hidden_layers": 3},
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    sliding_window=None,
    mlp_only_layers=(1,),
)
IN_TURN = msgspec.structs.replace(
    SMALL, num_hidden_layers=2, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=()
)
ARCHITECTURES = (
    Architecture(
        name="qwen3_moe",
        read=Qwen3MoeConfig.from_dict,
        describe=describe,
        tiny=(SMALL, IN_TURN),
    ),
)
