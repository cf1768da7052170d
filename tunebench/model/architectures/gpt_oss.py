"""gpt-oss: mixtures of experts with biases, attention with sinks, and a window in every other layer."""

from __future__ import annotations

import functools
from typing import Annotated

import msgspec

from tunebench.model.architectures import TINY, Architecture, Count, Heads, Positions, Positive, read_config
from tunebench.model.blocks import LayerType, WindowedConfig, attend, decoder, layer, names
from tunebench.model.description import Decoder, Experts, Matrix, Vector
from tunebench.model.rope import RopeScaling


class GptOssConfig(WindowedConfig, frozen=True, kw_only=True):
    """A gpt-oss, in the names of Hugging Face's config.json."""

    num_key_value_heads: Heads = 8
    head_dim: Heads = 64
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 150000.0
    sliding_window: Positions | None = 128
    attention_bias: bool = True
    num_local_experts: Count = 128
    num_experts_per_tok: Count = 4
    swiglu_alpha: Annotated[float, msgspec.Meta(ge=1.702, le=1.702)] = 1.702  # as `clamped_swiglu` has them
    swiglu_limit: Annotated[float, msgspec.Meta(ge=7, le=7)] = 7.0

    def usual_type(self, i: int) -> LayerType:
        """Of layer i where the config does not say."""
        return "full_attention" if i % 2 else "sliding_attention"


def describe(config: GptOssConfig) -> Decoder:
    """A gpt-oss's blocks and weights."""
    bias = config.attention_bias
    return decoder(
        config,
        [
            layer(
                config,
                at,
                attend(
                    config,
                    at,
                    bias=bias,
                    out_bias=bias,
                    window=config.window(i),
                    sinks=Vector(f"{at}.self_attn.sinks", config.num_attention_heads, dtype="float32"),
                ),
                _mixture(config, f"{at}.mlp"),
            )
            for i, at in enumerate(names(config))
        ],
    )


def _mixture(config: GptOssConfig, name: str) -> Experts:
    """Experts that are one tensor, the gate's outputs and those that it multiplies in turn."""
    count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
    router, up, down = f"{name}.router", f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
    in_turn = (inner, 2)

    def bias(of: str, length: int, arranged: tuple[int, int] = (1, 1)) -> Vector:
        return Vector(f"{of}_bias", count * length, arranged=arranged, experts=count)

    return Experts(
        router=Matrix(
            router, count, hidden, (f"{router}.weight",), bias=Vector(f"{router}.bias", count), stays_float=True
        ),
        up=Matrix(
            up,
            count * 2 * inner,
            hidden,
            (up,),
            bias=bias(up, 2 * inner, in_turn),
            arranged=in_turn,
            experts=count,
            transposed=True,
        ),
        down=Matrix(down, count * hidden, inner, (down,), bias=bias(down, hidden), experts=count, transposed=True),
        per_token=config.num_experts_per_tok,
        activation="clamped_swiglu",
    )


YARN = RopeScaling(rope_type="yarn", factor=8, original_max_position_embeddings=32, truncate=False)
ARCHITECTURES = (
    Architecture(
        name="gpt_oss",
        read=functools.partial(read_config, GptOssConfig),
        describe=describe,
        tiny=(
            GptOssConfig(
                **TINY, head_dim=16, sliding_window=24, rope_scaling=YARN, num_local_experts=4, num_experts_per_tok=2
            ),
        ),
    ),
)
