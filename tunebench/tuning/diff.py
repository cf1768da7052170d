"""Two databases side by side, kernel by kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunebench.tuning.content import Content, Kernel

State = Literal[
    "only in A", "only in B", "same record", "other record", "record in A only", "record in B only", "no record"
]


@dataclass(frozen=True)
class Pair:
    """One kernel in two databases, at least one of which knows it."""

    key: str
    a: Kernel | None
    b: Kernel | None

    @property
    def name(self) -> str:
        """The kernel's, as the first that knows it says."""
        return next((each.entry.name for each in (self.a, self.b) if each and each.entry.name), self.key)

    @property
    def state(self) -> State:
        """What they have of it."""
        if not self.a or not self.b:
            return "only in A" if self.a else "only in B"
        if not self.a.line and not self.b.line:
            return "no record"
        if not self.a.line or not self.b.line:
            return "record in A only" if self.a.line else "record in B only"
        return "same record" if self.a.trace == self.b.trace else "other record"


def pairs(a: Content, b: Content) -> list[Pair]:
    """Every kernel of either, by its name."""
    keys = dict.fromkeys([*a.kernels, *b.kernels])
    return sorted((Pair(key, a.kernels.get(key), b.kernels.get(key)) for key in keys), key=lambda pair: pair.name)
