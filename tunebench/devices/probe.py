"""What a device can do at most, measured with kernels of our own, in turn with what is benched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunebench import stats
from tunebench.timing import Clock, Protocol, Samples, interleave

COPY, READ, RING = "copy_bytes_per_s", "read_bytes_per_s", "ring_read_bytes_per_s"
FLOPS, HALVES, INT8 = "flops_per_s", "f16_flops_per_s", "int8_ops_per_s"
WORDS = {
    COPY: ("copying, read and written", 1e9, "GB/s"),
    READ: ("reading", 1e9, "GB/s"),
    RING: ("reading, by bulk copies to shared memory", 1e9, "GB/s"),
    FLOPS: ("multiply-adds in float32", 1e9, "GFLOP/s"),
    HALVES: ("matrix product in float16", 1e9, "GFLOP/s"),
    INT8: ("products of bytes", 1e9, "GOP/s"),
}
"""Every rate, for a reader: what it is of, its unit's size and name."""
UNITS = {"hz": (1e6, "MHz"), "c": (1, "°C"), "w": (1, "W"), "s": (1, "s"), "share": (0.01, "%")}
"""How the state's values are shown, by what their names end in."""
CHOICE = Protocol(warmups=0, samples=3, least_samples=2, budget_s=0.5)
CHOICE_S = 0.05  # a sample while ways are compared
SAMPLE_S = 0.1  # and afterwards
PROTOCOL = Protocol(warmups=1, samples=7, least_samples=5, budget_s=2.0)


@dataclass(frozen=True)
class Way:
    """One way to reach a rate: `prepare(n)` makes what does `amount` n times, and returns when that is done."""

    rate: str
    amount: float
    prepare: Callable[[int], Callable[[], Any]]


class Probe:
    """The fastest of several ways to each rate, chosen when it is made, as arms of a measurement.

    `arms` has one for the memory, the fastest of all reads and copies, and one for every other rate.
    """

    def __init__(
        self,
        ways: Sequence[Way] = (),
        held_bytes: int = 0,
        sample_s: float | None = None,
        clock: Clock = time.perf_counter_ns,
    ) -> None:
        self.held_bytes = held_bytes  # in buffers
        self._clock = clock
        sample_s = SAMPLE_S if sample_s is None else sample_s
        best = _best_ways(ways, clock)
        counts = {rate: max(1, math.ceil(sample_s / once_s)) for rate, (_, once_s) in best.items()}
        self._amounts = {rate: way.amount * counts[rate] for rate, (way, _) in best.items()}
        self._calls = {rate: way.prepare(counts[rate]) for rate, (way, _) in best.items()}
        bandwidths = {rate: way.amount / once_s for rate, (way, once_s) in best.items() if rate.endswith("bytes_per_s")}
        slower = set(bandwidths) - {max(bandwidths, key=bandwidths.__getitem__)} if bandwidths else set()
        self.arms = {rate: call for rate, call in self._calls.items() if rate not in slower}

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Bytes, and operations, per second, of the arms that were measured; a multiply-add counts as two."""
        return {name: 1e9 * self._amounts[name] / stats.median(each.samples_ns) for name, each in taken.items()}

    def __call__(self) -> dict[str, float]:
        """All rates, measured now."""
        return self.rates(interleave(self._calls, PROTOCOL, self._clock))


def _best_ways(ways: Sequence[Way], clock: Clock) -> dict[str, tuple[Way, float]]:
    """Of each rate the fastest way by its fastest sample, and its time for one `amount` in seconds."""
    counts = {way: _count(way, clock) for way in ways}
    taken = interleave({str(i): way.prepare(counts[way]) for i, way in enumerate(ways)}, CHOICE, clock)
    best: dict[str, tuple[Way, float]] = {}
    for way, samples in zip(ways, taken.values(), strict=True):
        once_s = max(1, min(samples.samples_ns)) / 1e9 / counts[way]
        rivals = best.get(way.rate)
        if rivals is None or way.amount / once_s > rivals[0].amount / rivals[1]:
            best[way.rate] = (way, once_s)
    return best


def _count(way: Way, clock: Clock) -> int:
    """How often a way must run to make a sample; what a first call loads and takes is not counted."""
    call = way.prepare(1)
    call()
    (once_ns,) = interleave({"": call}, Protocol(warmups=0, samples=1), clock)[""].samples_ns
    return max(1, math.ceil(CHOICE_S * 1e9 / max(1, once_ns)))


def repeated(call: Callable[[], Any]) -> Callable[[int], Callable[[], None]]:
    """A way's `prepare`, where repeating is all that it takes."""

    def prepare(times: int) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(times):
                call()

        return calls

    return prepare


def state_words(name: str, value: Any) -> tuple[str, str]:
    """A value of a device's state for a reader: its name, and itself in the unit that the name ends in."""
    words, _, suffix = name.rpartition("_")
    if suffix not in UNITS:
        words, suffix = name, ""
    size, unit = UNITS.get(suffix, (1, ""))
    if isinstance(value, list):
        shown = ", ".join(value) or "none"
    else:
        shown = "unknown" if value is None else f"{value / size:,.0f} {unit}".strip()
    return words.replace("_", " "), shown
