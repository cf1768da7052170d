"""What all runners share: what they are given, what becomes of a candidate, and what a runner does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

import tvm

from tunebench import stats
from tunebench.timing import Protocol

BUILD_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0
LONG_TIMEOUT_S = 3600.0  # of what runs a default schedule, which nothing bounds
CHOICE = Protocol(warmups=1, samples=9, least_samples=1, budget_s=0.3, sample_s=0.001, whole_rounds=True)
FINAL = Protocol(1, samples=21, least_samples=stats.FEWEST, budget_s=1.0, sample_s=0.001, whole_rounds=True)
"""The protocols of decisions, whatever they are about and on whatever device."""
REFERENCE_ONLY = Protocol(warmups=0, samples=1, least_samples=1)


@dataclass(frozen=True)
class MeasureInput:
    """A kernel to compare candidates of: its module with the default schedule, and what its inputs are."""

    name: str
    reference: str  # the module with its default schedule, as JSON
    depth: int  # value of a `position` input
    cold_bytes: int  # input sets are rotated until they add up to this
    exact: str = ""  # the module without a schedule: outputs are compared with what it is in float64, not the default's


@dataclass(frozen=True)
class Candidate:
    """A schedule to try."""

    name: str
    mod: tvm.IRModule

    @property
    def json(self) -> str:
        """The module, as worker processes get it."""
        return str(tvm.ir.save_json(self.mod))


@dataclass(frozen=True)
class Trial:
    """How candidates of one kernel are timed: one call only of those that take over `limit_ns`."""

    given: MeasureInput
    protocol: Protocol
    limit_ns: int


@dataclass(frozen=True)
class Timed:
    """A candidate that was built and correct: nanoseconds of one call, a sample each."""

    samples_ns: tuple[int, ...]


@dataclass(frozen=True)
class Failed:
    """A candidate without times, and why in one line."""

    reason: str


class NotBuilt(Failed):
    """Code generation or its compiler refused it."""


class Wrong(Failed):
    """Its outputs differ from the default schedule's."""


class TimedOut(Failed):
    """It did not end."""


class Died(Failed):
    """It failed while it ran, or took its process or its device down."""


Outcome = Timed | Failed


def for_each(found: Any, names: Iterable[str]) -> dict[str, Outcome]:
    """Outcomes by name; where what should have them failed as a whole, that is what became of each."""
    return found if isinstance(found, dict) else dict.fromkeys(names, found)


class Runner(Interface):
    """Builds, checks and times candidates of kernels. Close it when done."""

    builds_ahead: bool
    """Whether `build` returns at once, and candidates of one round may be built while another's are measured."""

    queued_s: float
    """How long callers have waited until a device was free."""

    def close(self) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What results keep of what ran, beside the device's own description; JSON types."""
        ...

    def prepare(self, given: MeasureInput, protocol: Protocol) -> Outcome:
        """Run the default schedule: its times, and the outputs that candidates are compared with."""
        ...

    def build(self, trial: Trial, candidates: Sequence[Candidate]) -> dict[str, Failed]:
        """Compile candidates, or begin to; those that are known to have failed already, by name."""
        ...

    def time(self, trial: Trial, name: str) -> Outcome:
        """Check a candidate that `build` was given against the reference, then time it."""
        ...

    def compare(
        self, given: MeasureInput, candidates: Sequence[Candidate], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved with each other and the default (named `default`)."""
        ...
