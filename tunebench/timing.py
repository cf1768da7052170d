"""The timing loop, over anything that can be called, with any clock.

Arms of a comparison are interleaved in random order, warm-ups are kept apart, and a slow arm gets fewer
samples rather than a longer wait.
"""

import functools
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

Clock = Callable[[], int]
Take = Callable[[Any, int], int]
"""Runs a call so many times; nanoseconds of one."""
Size = Callable[[Any, list[int]], int]
"""How many calls make a sample, by the call and its warm-ups' nanoseconds."""
Around = Callable[[str], AbstractContextManager[object]]
"""What is done right before and after a counted sample of an arm, beside the time that is taken."""


@dataclass(frozen=True)
class Protocol:
    """How often to measure. Counts are per arm, times in seconds."""

    warmups: int = 1
    samples: int = 11
    least_samples: int = 3  # also for an arm that is over its budget
    budget_s: float = 2.0  # per arm; once spent, the arm stops at `least_samples`
    patience_s: float = float("inf")  # an arm whose warm-up took longer gets one sample
    sample_s: float = 0.0  # a sample averages as many calls as fill this, at least one
    whole_rounds: bool = False  # of a kernel's input sets: a sample has a call on each


@dataclass
class Samples:
    """Nanoseconds per call, in the order measured."""

    warmup_ns: list[int] = field(default_factory=list)
    samples_ns: list[int] = field(default_factory=list)
    calls: int = 1  # per sample

    @property
    def spent_s(self) -> float:
        """Wall-clock that the counted samples took."""
        return sum(self.samples_ns) * self.calls / 1e9


def interleave(
    arms: Mapping[str, Callable[..., Any]],
    protocol: Protocol,
    clock: Clock = time.perf_counter_ns,
    seed: int = 0,
    take: Take | None = None,
    calls: Size | None = None,
    around: Around = nullcontext,
) -> dict[str, Samples]:
    """Time every arm in turn, in a new random order each round.

    Each call must return when its work is done, unless `take` knows another way to time it. `calls` says how many of
    an arm make a sample, where that is not what fills the protocol's `sample_s`.
    """
    order = list(arms)
    rng = random.Random(seed)
    take = take or functools.partial(_one, clock)
    size = calls or functools.partial(_filling, protocol)
    taken = {name: _warm_up(arms[name], protocol, take, size) for name in order}
    for _ in range(protocol.samples):
        rng.shuffle(order)
        for name in order:
            samples = taken[name]
            if _goes_on(samples, protocol):
                with around(name):
                    sample_ns = take(arms[name], samples.calls)
                samples.samples_ns.append(sample_ns)
    return taken


def _goes_on(samples: Samples, protocol: Protocol) -> bool:
    least = 1 if sum(samples.warmup_ns) > protocol.patience_s * 1e9 else protocol.least_samples
    return len(samples.samples_ns) < least or samples.spent_s <= min(protocol.budget_s, protocol.patience_s)


def _warm_up(call: Callable[..., Any], protocol: Protocol, take: Take, size: Size) -> Samples:
    warmup = [take(call, 1) for _ in range(protocol.warmups)]
    return Samples(warmup_ns=warmup, calls=size(call, warmup))


def _filling(protocol: Protocol, call: Callable[..., Any], warmup_ns: list[int]) -> int:
    return max(1, round(protocol.sample_s * 1e9 / max(1, min(warmup_ns)))) if warmup_ns else 1


def _one(clock: Clock, call: Callable[[], Any], calls: int) -> int:
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) // calls
