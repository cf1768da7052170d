"""In what state a device was while it was measured: clocks and heat, samples taken while it was slowed down, energy."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

LEAST_S = 1.0  # of an arm's samples together, for its energy to be told
LEAST_STEPS = 5  # of the energy counter in every sample
REPEATED_S, REPEATED_STEPS = 1.5, 20  # that an arm of shorter samples runs again and again, at least
WATCHED_S = 0.5  # for a counter that takes longer to move, there is no energy


class Conditions:
    """What a device tells of its state. These are the answers of one that tells nothing."""

    def state(self) -> dict[str, Any]:
        """Clocks in Hz, temperature in degrees Celsius, power in W, and what else there is, now; None: unknown."""
        return {}

    def throttle_count(self) -> int:
        """A number that has grown if the device was slowed down by heat or for want of power since the last call."""
        return 0

    def energy_j(self) -> float | None:
        """What the device took since some moment, in joules; None where there is no counter."""
        return None

    @functools.cached_property
    def step_s(self) -> float | None:
        """How long the energy counter stands still between two steps; None where it does not move."""
        return counter_step_s(self.energy_j)


def counter_step_s(read: Callable[[], float | None], clock: Callable[[], float] = time.perf_counter) -> float | None:
    """How long a counter takes from one step to the next, in seconds; None for one that does not move."""
    end = clock() + WATCHED_S
    stepped: list[float] = []
    last = read()
    while last is not None and len(stepped) < 2 and clock() < end:
        if (now := read()) != last:
            last = now
            stepped.append(clock())
    return stepped[1] - stepped[0] if len(stepped) == 2 else None


class Watch:
    """Devices looked at while the samples of a test are taken: in a `with` block around them, `around` at each.

    `arms` has the device that each arm of the measurement runs on.
    """

    def __init__(self, arms: Mapping[str, Conditions], clock: Callable[[], float] = time.perf_counter) -> None:
        self._arms, self._clock = dict(arms), clock
        self._start: dict[Conditions, dict[str, Any]] = {}
        self._end: dict[Conditions, dict[str, Any]] = {}
        self._throttled: defaultdict[str, list[bool]] = defaultdict(list)
        self._joules: defaultdict[str, list[float | None]] = defaultdict(list)
        self._repeated_j: dict[str, float] = {}  # of one sample, where many were taken in a row for it

    def __enter__(self) -> Watch:
        self._start = self._states()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = self._states()

    def _states(self) -> dict[Conditions, dict[str, Any]]:
        return {each: each.state() for each in dict.fromkeys(self._arms.values())}

    @contextmanager
    def around(self, arm: str) -> Iterator[None]:
        """Right before and after one sample of an arm; the energy is read nearest to it."""
        device = self._arms.get(arm)
        if device is None:
            yield
            return
        throttles, before_j = device.throttle_count(), device.energy_j()
        yield
        after_j = device.energy_j()
        self._throttled[arm].append(device.throttle_count() != throttles)
        self._joules[arm].append(None if before_j is None or after_j is None else after_j - before_j)

    def repeat(self, arm: str, sample: Callable[[], object], samples_ns: list[int]) -> None:
        """Take samples in a row for their energy, where those that were timed in turn are too short for the counter."""
        device = self._arms.get(arm)
        if device is None or not samples_ns or self._of_samples(arm, samples_ns) is not None or device.step_s is None:
            return
        sample()  # what ran before is not this arm's
        before_j, count = device.energy_j(), 0
        end = self._clock() + max(REPEATED_S, REPEATED_STEPS * device.step_s)
        while self._clock() < end:
            sample()
            count += 1
        after_j = device.energy_j()
        if before_j is not None and after_j is not None:
            self._repeated_j[arm] = (after_j - before_j) / count

    def found(self, arm: str, samples_ns: list[int], tokens: int) -> dict[str, Any]:
        """What a result of an arm says of it, its samples being of so many tokens each."""
        if arm not in self._arms:
            return {}
        device = self._arms[arm]
        states = {"start": self._start.get(device), "end": self._end.get(device)}
        return {
            "conditions": states if any(states.values()) else {},
            "throttled": [place for place, throttled in enumerate(self._throttled[arm]) if throttled],
            "joules_per_token": self._joules_per_token(arm, samples_ns, tokens),
        }

    def _joules_per_token(self, arm: str, samples_ns: list[int], tokens: int) -> float | None:
        joules = self._repeated_j.get(arm) or self._of_samples(arm, samples_ns)
        return None if joules is None else joules / tokens

    def _of_samples(self, arm: str, samples_ns: list[int]) -> float | None:
        """Joules of one sample; None where the counter is too coarse: each has up to a step of what was before it."""
        joules = [each for each in self._joules[arm] if each is not None]
        if not samples_ns or len(joules) != len(samples_ns) or sum(samples_ns) < LEAST_S * 1e9:
            return None
        step_s = self._arms[arm].step_s
        if step_s is None or min(samples_ns) < LEAST_STEPS * step_s * 1e9:
            return None
        return sum(joules) / len(joules)
