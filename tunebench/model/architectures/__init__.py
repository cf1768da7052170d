"""Architectures, one module each, named as Hugging Face's `model_type`.

A module lists its `ARCHITECTURES`, and owns its config type and the description of its decoder: which blocks there
are, and the names of their weights. What several share is in `model.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec

from tunebench import registry
from tunebench.errors import TuneBenchError
from tunebench.kernels.operation import Activation
from tunebench.model.description import Decoder
from tunebench.model.rope import RopeScaling, read_rope

Extent = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]
"""Of a matrix: four million are more than any has."""
Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Heads = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
"""Of experts."""
Positions = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Base = Annotated[float, msgspec.Meta(gt=1, le=1e15)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"), "gelu_pytorch_tanh"),
}
CHANGES = (
    *("attention_bias", "qkv_bias", "mlp_bias", "lm_head_bias", "use_bias", "clip_qkv", "use_sliding_window"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier"),
    *("residual_multiplier", "attention_multiplier", "use_qk_norm", "qk_norm", "qk_layernorm", "rope_interleaved"),
    *("partial_rotary_factor", "rotary_pct", "num_experts", "num_local_experts", "use_bidirectional_attention"),
    *("alibi", "attn_temperature_tuning", "no_rope_layers", "num_kv_shared_layers"),
)
"""Keys that change what some decoder computes: one that an architecture does not read has to be off, or 1."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every decoder has, in the names of Hugging Face's config.json: enough for its cache and its memory."""

    hidden_size: Extent
    intermediate_size: Extent
    num_hidden_layers: Layers
    num_attention_heads: Heads
    vocab_size: Extent
    num_key_value_heads: Heads = 0  # left out: as many as attention heads
    head_dim: Heads = 0  # left out: hidden_size / num_attention_heads
    rope_theta: Base = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Positions = 2048

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        msgspec.structs.force_setattr(self, "num_key_value_heads", self.num_key_value_heads or heads)
        msgspec.structs.force_setattr(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads does not divide num_attention_heads")
        if self.head_dim and not self.rotated:
            raise ValueError("partial_rotary_factor leaves no element of a head to rotate")
        scaling, turns = self.rope_scaling, (self.rotated + 1) // 2
        for factors in (scaling.short_factor, scaling.long_factor) if scaling else ():
            if factors and len(factors) != turns:
                raise ValueError(f"rope_scaling has {len(factors)} factors, not {turns}")

    @property
    def rotated(self) -> int:
        """Elements of a head that rotary embedding turns, its first."""
        return self.head_dim


Config = TypeVar("Config", bound=ModelConfig)


def read_config(kind: type[Config], data: Mapping[str, Any], source: str) -> Config:
    """A config of some type from Hugging Face's; a TuneBenchError names what is missing, makes no sense or is unknown.

    null is as good as missing, but where a type has None for a feature that is off.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    nested = data.get("rope_scaling") or data.get("rope_parameters") or {}
    data = {**data, **read_rope(nested, data, fields["rope_theta"].default, source)}
    _refuse_unread(data, set(fields), source)
    given = {name: data[name] for name, field in fields.items() if name in data and _says(data[name], field)}
    for name in {"hidden_act", "hidden_activation"} & set(given):
        given[name] = _activation(given[name], f"{source}: {name}")
    missing = [field.name for field in fields.values() if field.required and field.name not in given]
    if missing:
        raise TuneBenchError(f"{source} is no model config: {', '.join(missing)} missing.", "Name a config.json.")
    try:
        return msgspec.convert(given, kind)
    except ValueError as error:
        what, _, place = str(error).partition(" - at `$.")
        where = f"{source}: {place.removesuffix('`')}" if place else source
        raise TuneBenchError(f"{where}: {what}.", "Name a config.json.") from None


def _says(value: Any, field: msgspec.structs.FieldInfo) -> bool:
    return value is not None or type(None) in get_args(field.type)


def _activation(name: Any, where: str) -> str:
    """An activation's first name."""
    found = ALIASES.get(str(name), str(name))
    if found not in ACTIVATIONS:
        raise TuneBenchError(f"{where} {found[:80]!r} is not supported.", f"There are {', '.join(ACTIVATIONS)}.")
    return found


def _refuse_unread(data: Mapping[str, Any], read: set[str], source: str) -> None:
    """Raise a TuneBenchError where a config asks for what its architecture does not compute."""
    asked = {key: data.get(key) for key in CHANGES if key not in read}
    for key, value in asked.items():
        if value and (value is True or value != 1):
            raise TuneBenchError(f"{source}: {key} is not supported for this architecture.", "Choose another model.")
    types = data.get("layer_types") or []
    other = [kind for kind in types if kind != "full_attention"] if isinstance(types, list) else [types]
    if other and "layer_types" not in read:
        what = f"layer_types has {str(other[0])[:80]}, which is not supported for this architecture"
        raise TuneBenchError(f"{source}: {what}.", "Choose another model.")


TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
"""What the models that tests run have in common."""


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


def read(data: Mapping[str, Any], source: str) -> tuple[Architecture[Any], ModelConfig]:
    """The architecture that a Hugging Face config names, and the config as it reads it.

    A TuneBenchError says what of it is not supported: first of all the architecture itself.
    """
    data = _text(data)
    architecture = registry.pick(architectures(), str(data["model_type"]), "model_type")
    return architecture, architecture.read(data, source)


def _text(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder in that of a model which takes pictures too."""
    text = data.get("text_config")
    if not isinstance(text, Mapping):
        return data
    shared = {key: data[key] for key in ("tie_word_embeddings",) if key in data}
    return {"model_type": f"{data['model_type']}_text", **shared, **text}
