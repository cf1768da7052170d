"""Mixtral: Mistral whose gated second halves are mixtures of experts."""

from __future__ import annotations

import functools

from tunebench.model.architectures import (
    ACTIVATIONS,
    TINY,
    Architecture,
    Count,
    Heads,
    Positions,
    Positive,
    read_config,
)
from tunebench.model.blocks import LlamaLikeConfig, attend, decoder, layer, names
from tunebench.model.description import Decoder, Experts, Matrix


class MixtralConfig(LlamaLikeConfig, frozen=True, kw_only=True):
    """A Mixtral, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 8
    sliding_window: Positions | None = None
    rope_theta: Positive = 1e6
    rms_norm_eps: Positive = 1e-5
    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2


def describe(config: MixtralConfig) -> Decoder:
    """A Mixtral's blocks and weights."""
    window, inner = config.sliding_window or 0, config.intermediate_size
    return decoder(
        config,
        [
            layer(
                config,
                at,
                attend(config, at, window=window),
                mixture(
                    config,
                    f"{at}.block_sparse_moe",
                    ("w1", "w3", "w2"),
                    (config.num_local_experts, config.num_experts_per_tok, inner),
                ),
            )
            for at in names(config)
        ],
    )


def mixture(
    config: LlamaLikeConfig,
    name: str,
    parts: tuple[str, str, str],
    shape: tuple[int, int, int],
    normalized: bool = True,
) -> Experts:
    """Experts that are tensors of their own.

    `parts` are what the gate, what it multiplies and the last product are called in each; `shape` says how many experts
    there are, how many a token has, and their width.
    """
    (count, per_token, inner), hidden = shape, config.hidden_size

    def of_all(*stacked: str) -> tuple[str, ...]:
        return tuple(f"{name}.experts.{i}.{part}.weight" for i in range(count) for part in stacked)

    return Experts(
        router=Matrix(f"{name}.gate", count, hidden, (f"{name}.gate.weight",), stays_float=True),
        up=Matrix(f"{name}.experts.gate_up", count * 2 * inner, hidden, of_all(*parts[:2]), experts=count),
        down=Matrix(f"{name}.experts.down", count * hidden, inner, of_all(parts[2]), experts=count),
        per_token=per_token,
        normalized=normalized,
        activation=ACTIVATIONS[config.hidden_act],
    )


ARCHITECTURES = (
    Architecture(
        name="mixtral",
        read=functools.partial(read_config, MixtralConfig),
        describe=describe,
        tiny=(MixtralConfig(**TINY, head_dim=16, num_local_experts=4),),
    ),
)
