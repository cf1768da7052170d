"""Rotary embedding as Hugging Face's `rope_parameters` (earlier: `rope_scaling`) describe it, as frequencies.

Frequencies are computed in float32 and in the order of transformers' `ROPE_INIT_FUNCTIONS`, as models were trained with
them: far along a context, the last bit of a frequency shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunebench.errors import TuneBenchError
from tunebench.model.description import Rope, Ropes

Floats: TypeAlias = NDArray[np.float32]
Factor = Annotated[float, msgspec.Meta(ge=1, le=1e6)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Positions = Annotated[int, msgspec.Meta(ge=2, le=2**40)]
ORIGINAL = ("dynamic", "llama3", "yarn", "longrope")
"""Kinds that ask for how many positions the model was first trained."""
ALIASES = {"su": "longrope"}
HARMLESS = ("type", "rope_type", "rope_theta", "finetuned")


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How frequencies differ from the default's, in Hugging Face's names; complete, nothing is left to other keys."""

    rope_type: str
    factor: Factor = 1.0
    original_max_position_embeddings: Positions = 2048
    attention_factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # proportional: the others stay

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor is not above low_freq_factor")


NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("factor", "short_factor", "long_factor"),
    "proportional": (),
}
"""The kinds that there are, and what each cannot do without."""


def read_rope(nested: Any, data: Mapping[str, Any], default_theta: float, source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config, from its keys and those of one of its ropes, which win.

    `rope_scaling` is None for the default rotation, else what a `RopeScaling` is made of; `partial_rotary_factor` is
    among them where the rope names one. A TuneBenchError says what is not supported.
    """
    given = {key: value for key, value in as_object(nested, source).items() if value is not None}
    kind = str(given.get("rope_type", given.get("type", "default")))
    kind = ALIASES.get(kind, kind)
    theta = given.get("rope_theta", data.get("rope_theta"))
    found = {"rope_theta": default_theta if theta is None else theta, "rope_scaling": None}
    scaling = {key: value for key, value in given.items() if key not in HARMLESS}
    if kind != "proportional" and "partial_rotary_factor" in scaling:
        found["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if kind == "default" or (kind == "linear" and scaling.get("factor") == 1):
        return found
    if kind not in NEEDED:
        hint = f"There are default, {', '.join(NEEDED)}."
        raise TuneBenchError(f"{source}: rope_type {kind[:80]!r} is not supported.", hint)
    scaling = {"rope_type": kind, **_implied(kind, scaling, data), **scaling}
    missing = [name for name in NEEDED[kind] if name not in scaling]
    if missing:
        raise TuneBenchError(f"{source}: {kind} rotary embedding lacks {', '.join(missing)}.", "Name a config.json.")
    return {**found, "rope_scaling": scaling}


def as_object(value: Any, source: str) -> Mapping[str, Any]:
    """What a config says of ropes; a TuneBenchError where it is no object. null is an empty one."""
    if isinstance(value, Mapping):
        return value
    if value is None:
        return {}
    raise TuneBenchError(f"{source}: rope_parameters are no object.", "Name a config.json.")


def _implied(kind: str, scaling: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of a rope outside of it: the positions before its context was extended, and the ratio."""
    if kind not in ORIGINAL:
        return {}
    longest = data.get("max_position_embeddings")
    inside = scaling.pop("original_max_position_embeddings", longest)
    original = longest if kind == "dynamic" else data.get("original_max_position_embeddings") or inside
    found = {"original_max_position_embeddings": original} if original is not None else {}
    numbers = [each for each in (longest, original) if isinstance(each, int) and 0 < each < 2**40]
    if kind in ("yarn", "longrope") and len(numbers) == 2:
        found["factor"] = max(1.0, numbers[0] / numbers[1])
    return found


def ropes(theta: float, dim: int, scaling: RopeScaling | None = None) -> Ropes:
    """The rotations of the first `dim` elements of a head with base `theta`."""
    if scaling is None:
        return Ropes(_rope(_default(theta, dim)))
    return KINDS[scaling.rope_type](theta, dim, scaling)


def _rope(inv_freq: Floats, times: float = 1.0) -> Rope:
    return Rope(tuple(map(float, inv_freq)), times)


def _powers(theta: float, dim: int) -> Floats:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)  # as torch's, which rounds nearly always so


def _default(theta: float, dim: int) -> Floats:
    return np.float32(1) / _powers(theta, dim)


def _linear(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    return Ropes(_rope(_default(theta, dim) / np.float32(scaling.factor)))


def _dynamic(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    """Beyond the positions of training, the base grows with the context that the cache is for."""
    limit, factor = scaling.original_max_position_embeddings, scaling.factor

    def grown(context: int) -> Rope:
        return _rope(_default(theta * ((factor * context / limit) - (factor - 1)) ** (dim / max(dim - 2, 1)), dim))

    return Ropes(_rope(_default(theta, dim)), limit, grown)


def _llama3(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    """Long wavelengths are interpolated, short ones stay, those between go over."""
    inv_freq, original = _default(theta, dim), scaling.original_max_position_embeddings
    named = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
    factor, low, high = (np.float32(each) for each in named)
    wavelength = np.float32(2 * math.pi) / inv_freq
    is_long, is_short = wavelength > original / float(low), wavelength < original / float(high)
    slow = np.where(is_long, inv_freq / factor, inv_freq)
    share = (np.float32(original) / wavelength - low) / (high - low)
    smooth = (1 - share) * slow / factor + share * slow
    return Ropes(_rope(np.where(is_long | is_short, slow, smooth)))


def _yarn(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    """Elements of many rotations within the original positions stay, those of few are interpolated."""
    factor = scaling.factor
    powers = _powers(theta, dim)
    stretched, kept = np.float32(1) / (np.float32(factor) * powers), np.float32(1) / powers
    low, high = (_place(turns, theta, dim, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    share = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    return Ropes(_rope(stretched * (np.float32(1) - share) + kept * share, _yarn_attention(factor, scaling)))


def _place(turns: float, theta: float, dim: int, scaling: RopeScaling) -> float:
    """The element that makes so many turns within the original positions."""
    original = scaling.original_max_position_embeddings
    return (dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(theta))


def _yarn_attention(factor: float, scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by."""

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1)


def _longrope(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    """Each element has a factor of its own: one for contexts as in the first training, one beyond them."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    times = scaling.attention_factor
    if times is None:
        times = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (
        _rope(np.float32(1) / (np.array(each, np.float32) * _powers(theta, dim)), times)
        for each in (scaling.short_factor, scaling.long_factor)
    )
    return Ropes(short, original, lambda context: long)


def _proportional(theta: float, dim: int, scaling: RopeScaling) -> Ropes:
    """A first part of the elements turns, with the frequencies that it has among all of them."""
    turning = int((scaling.partial_rotary_factor) * dim // 2)
    inv_freq = _default(theta, dim) * (np.arange(dim // 2) < turning)
    return Ropes(_rope(inv_freq / np.float32(scaling.factor)))


KINDS: Mapping[str, Callable[[float, int, RopeScaling], Ropes]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
