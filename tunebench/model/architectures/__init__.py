"""Architectures, one module each, named as Hugging Face's `model_type`.

A module lists its `ARCHITECTURES`, and owns its config type and the description of its decoder: which blocks there
are, and the names of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from tunebench import registry
from tunebench.errors import TuneBenchError
from tunebench.model.description import Decoder

Extent = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
"""Of a matrix: four million are more than any has."""
Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Heads = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Positions = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every decoder has, in the names of Hugging Face's config.json: enough for its cache and its memory."""

    hidden_size: Extent
    intermediate_size: Extent
    num_hidden_layers: Layers
    num_attention_heads: Heads
    vocab_size: Extent
    num_key_value_heads: Heads = 0  # left out: as many as attention heads
    head_dim: Heads = 0  # left out: hidden_size / num_attention_heads
    rope_theta: Positive = 10000.0
    max_position_embeddings: Positions = 2048

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        msgspec.structs.force_setattr(self, "num_key_value_heads", self.num_key_value_heads or heads)
        msgspec.structs.force_setattr(self, "head_dim", self.head_dim or self.hidden_size // heads)


Config = TypeVar("Config", bound=ModelConfig)


def read_config(kind: type[Config], data: Mapping[str, Any], source: str) -> Config:
    """A config of some type; a TuneBenchError names what is missing or makes no sense. null is as good as missing."""
    fields = msgspec.structs.fields(kind)
    given = {field.name: data[field.name] for field in fields if data.get(field.name) is not None}
    missing = [field.name for field in fields if field.required and field.name not in given]
    if missing:
        raise TuneBenchError(f"{source} is no model config: {', '.join(missing)} missing.", "Name a config.json.")
    try:
        return msgspec.convert(given, kind)
    except ValueError as error:
        what, _, place = str(error).partition(" - at `$.")
        where = f"{source}: {place.removesuffix('`')}" if place else source
        raise TuneBenchError(f"{where}: {what}.", "Name a config.json.") from None


@dataclass(frozen=True)
class Architecture(Generic[Config]):
    """One `model_type`: how its config is read, and the decoder that it describes."""

    name: str
    read: Callable[[Mapping[str, Any], str], Config]  # Hugging Face's config, and what errors call it
    describe: Callable[[Config], Decoder]
    tiny: tuple[Config, ...]  # for tests: between them, everything that it can be


def architectures() -> dict[str, Architecture[Any]]:
    """Every architecture by `model_type`."""
    return registry.load(__name__, "ARCHITECTURES", Architecture)
