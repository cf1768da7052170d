"""What a kernel computes, as a value: its kind, extents, element types and, of a matrix product, the weight format.

As text it is the JSON that a kernel carries in its attribute `tunebench.op`. The text is part of the structural hash by
which databases find a kernel, so what it says of formats that it has always known stays letter for letter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from tunebench.spec import Packing, WeightFormat


@dataclass(frozen=True)
class Operation:
    """The base of them all; `kind` is how the text names one."""

    kind: ClassVar[str]

    def described(self) -> dict[str, Any]:
        """What the text says: plain values by name, those left out that are what their defaults say."""
        usual = {each.name for each in fields(self) if each.default is not MISSING} - self.extras()
        return {"op": self.kind, **{name: value for name, value in asdict(self).items() if name not in usual}}

    def text(self) -> str:
        """Of the attribute."""
        return json.dumps(self.described())

    def extras(self) -> set[str]:
        """What it is asked for beyond the plain operation: the names of fields that are not as their defaults say."""
        optional = [each for each in fields(self) if each.default is not MISSING]
        return {each.name for each in optional if getattr(self, each.name) != each.default}

    @classmethod
    def read(cls, values: dict[str, Any]) -> Operation:
        """The operation that `described` described, less its kind."""
        return cls(**values)


@dataclass(frozen=True)
class Matmul(Operation):
    """x [m, k] @ weight [n, k].T (+ residual [m, n]) -> [m, n]; fused, with x normalised before or y gated after."""

    kind = "matmul"
    m: int
    n: int
    k: int
    out: str  # element type of the output
    residual: bool
    dtype: str  # of x, and of the residual
    weight: WeightFormat
    norm: float | None = None  # the epsilon of a normalisation of x, whose weights come behind x
    gate: bool = False  # silu of the first half of the outputs multiplies the second: [m, n / 2]
    bias: bool = False  # a vector [n], added to every row

    def described(self) -> dict[str, Any]:
        """What the text says. Of a weight, what differs from the format that its bits, group and layout suggest."""
        weight = self.weight
        known = {"bits": weight.bits, "group": weight.group, "layout": weight.layout}
        usual = asdict(_usual(known, self.dtype))
        more = {name: value for name, value in asdict(weight).items() if value != usual[name]}
        extents = {"m": self.m, "n": self.n, "k": self.k, "out": self.out, "residual": int(self.residual)}
        extents |= {"bias": 1} if self.bias else {}
        return {"op": self.kind, **extents, "dtype": self.dtype, **known, **({"weight": more} if more else {})}

    @classmethod
    def read(cls, values: dict[str, Any]) -> Operation:
        """The operation that `described` described, less its kind."""
        weight = _usual({name: values.pop(name) for name in ("bits", "group", "layout")}, values["dtype"])
        weight = WeightFormat(**{**asdict(weight), **values.pop("weight", {})})
        flags = {name: bool(values.get(name)) for name in ("residual", "bias")}
        return cls(**{**values, **flags, "weight": weight})


def _usual(known: Mapping[str, Any], dtype: str) -> WeightFormat:
    """The format of so many bits, group and layout that is symmetric, with scales of the activations' type."""
    packing: Packing = "by_byte" if known["layout"] == "N16" else "in_order"
    return WeightFormat("integer" if known["group"] else "float", dtype=dtype, packing=packing, **known)


@dataclass(frozen=True)
class OverCache(Operation):
    """Of m new tokens of b sequences, with `heads` heads of `dim` elements over a cache of `context` positions."""

    b: int
    m: int
    heads: int
    kv_heads: int
    dim: int
    context: int
    dtype: str
    kv: str = ""  # int8 or fp8: each head's keys, and its values, at a position have a float32 scale [2, b, G, C]


@dataclass(frozen=True)
class Attention(OverCache):
    """Each token's mix of the values up to its own position."""

    kind = "attention"
    scale: float = 0.0  # of the scores; 0: dim^-1/2
    softcap: float = 0.0  # scores s become softcap tanh(s / softcap)
    window: int = 0  # only so many positions are seen, a token's own among them; 0: all
    sinks: bool = False  # each head has a score, float32 [heads], that takes its share and has no value

    @property
    def scaled(self) -> float:
        """What the scores are multiplied with."""
        return self.scale or self.dim**-0.5


@dataclass(frozen=True)
class Append(OverCache):
    """The rotation of the tokens' queries and keys, and the place of keys and values in the cache."""

    kind = "append"
    rotary: int = 0  # elements of a head, its first, that are rotated, d with d + rotary / 2; 0: all
    norm: float = 0.0  # epsilon of the queries' and keys' normalisation before that, by weights [dim] each; 0: none

    @property
    def rotated(self) -> int:
        """Elements of a head that are rotated."""
        return self.rotary or self.dim


@dataclass(frozen=True)
class RmsNorm(Operation):
    """Rows [rows, width], each divided by its root mean square and multiplied by weights [width]; then added to."""

    kind = "rms_norm"
    rows: int
    width: int
    epsilon: float
    dtype: str
    residual: bool = False  # [rows, width] is added to what comes out


@dataclass(frozen=True)
class LayerNorm(Operation):
    """Rows [rows, width] less their mean, divided by their deviation, times weights [width], plus a bias [width]."""

    kind = "layer_norm"
    rows: int
    width: int
    epsilon: float
    dtype: str


Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]
"""`gelu` by the error function; `clamped_swiglu` as gpt-oss gates: the activation and what it multiplies, clamped."""


@dataclass(frozen=True)
class SiluMul(Operation):
    """[rows, 2 width] -> activation(first half) * second half, [rows, width]."""

    kind = "silu_mul"
    rows: int
    width: int
    dtype: str
    activation: Activation = "silu"


@dataclass(frozen=True)
class Activate(Operation):
    """[rows, width] -> activation of each, [rows, width]."""

    kind = "activate"
    rows: int
    width: int
    dtype: str
    activation: Activation = "gelu"


@dataclass(frozen=True)
class LastRow(Operation):
    """[b, m, width] -> one row of each sequence, [b, width]."""

    kind = "last_row"
    b: int
    m: int
    width: int
    dtype: str


KINDS: dict[str, type[Operation]] = {
    each.kind: each for each in (Matmul, Attention, Append, RmsNorm, LayerNorm, SiluMul, Activate, LastRow)
}


def parse(text: str) -> Operation:
    """The operation that an attribute's text describes."""
    values = json.loads(text)
    return KINDS[values.pop("op")].read(values)
