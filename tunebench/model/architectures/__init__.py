"""Architectures, one module each, named as Hugging Face's `model_type`.

A module lists its `ARCHITECTURES`. Reading a config needs none of them, and so no TVM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from tunebench import registry
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from tvm.relax.frontend.nn import Module, Tensor

    from tunebench.spec import Workload


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder needs, in the names of Hugging Face's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str) -> ModelConfig:
        """Read Hugging Face's config; a TuneBenchError names what is missing or makes no sense."""
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        missing = [name for name in needed if name not in data]
        if missing:
            raise TuneBenchError(f"{source} is no model config: {', '.join(missing)} missing.", "Name a config.json.")
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise TuneBenchError(f"{source} asks for scaled rotary embedding, which is not supported.")
        data = {**({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}), **data}
        if data.get("attention_bias") or data.get("mlp_bias") or data.get("hidden_act", "silu") != "silu":
            raise TuneBenchError(f"{source} asks for biases or another activation than silu: not supported.")
        values = {item.name: data[item.name] for item in fields(ModelConfig) if data.get(item.name) is not None}
        for name, value in values.items():
            if isinstance(value, str) or (name in needed and (not isinstance(value, int) or value <= 0)):
                raise TuneBenchError(f"{source}: {name} is {value!r}, not a positive number.")
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        if heads % values["num_key_value_heads"]:
            raise TuneBenchError(f"{source}: num_key_value_heads does not divide num_attention_heads.")
        return ModelConfig(**values)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [n, k] that a scheme may quantize, and the Hugging Face tensors stacked in it."""

    n: int
    k: int
    sources: tuple[str, ...]
    is_table: bool = False  # looked up by row, not multiplied


class Stored(Protocol):
    """A weight matrix [n, k] in a scheme's form, a `Module` of the frontend."""

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None) -> Tensor:
        """x [rows, k] -> [rows, n], added to `residual` where there is one."""
        ...

    def take(self, tokens: Tensor) -> Tensor:
        """Row numbers, int32 [count] -> [count, k]."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One `model_type`: its weights by name, and its computation."""

    name: str
    matrices: Callable[[ModelConfig], dict[str, Matrix]]
    vectors: Callable[[ModelConfig], dict[str, int]]  # weights that stay float, Hugging Face's names, lengths
    build: Callable[[ModelConfig, Workload, Callable[[str], Any]], Module]  # the last: a matrix's name -> Stored
    tiny: ModelConfig  # for tests


def architectures() -> dict[str, Architecture]:
    """Every architecture by `model_type`."""
    return registry.load(__name__, "ARCHITECTURES", Architecture)
