"""One row beside another: how many times as fast it is, with its interval, and whether that is called a difference."""

from collections.abc import Sequence
from math import nan
from typing import Any, Literal

from tunebench import stats
from tunebench.report.probes import device_key
from tunebench.results import Result

Effect = Literal["faster", "slower", "no clear difference", "too few samples", "noise floor unknown", "not interleaved"]
CLEAR = ("faster", "slower")
PEER = "library"  # the schedule of engines that bring their own kernels


def beside(name: str, reference: Result | None, row: Result | None) -> dict[str, Any]:
    """How many times as fast `row` is as `reference`, as the columns of `name`; empty where one of them has no figure.

    The columns are the ratio `name`, its 95 % interval `name_low` and `name_high`, and the `Effect` `name_effect`.
    """
    if reference is None or row is None or row.status != "ok" or reference.status != "ok":
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), nan) | {f"{name}_effect": None}
    interval = stats.ratio_interval(reference.samples_ns, row.samples_ns)
    found = effect(reference.samples_ns, row.samples_ns, noise_floor(reference, row))
    return {name: interval.ratio, f"{name}_low": interval.low, f"{name}_high": interval.high, f"{name}_effect": found}


def noise_floor(*rows: Result) -> float | None:
    """The floor below which no difference between `rows` is called, as a ratio - 1: the largest that is known."""
    return max((row.noise for row in rows if row.noise is not None), default=None)


def effect(reference_ns: Sequence[float], samples_ns: Sequence[float], noise: float | None) -> Effect:
    """What a difference is called: none is `faster` or `slower` that is within `noise`, or where that is unknown."""
    floor = noise or 0.0
    decided = stats.decide(reference_ns, samples_ns, floor)
    interval = decided.interval
    if not interval.known:
        return "too few samples"
    if noise is None:
        return "noise floor unknown"
    if decided.decision == "promoted":
        return "faster"
    return "slower" if interval.high < 1 and interval.ratio < 1 / (1 + floor) else "no clear difference"


class Across:
    """What each run has of its first target, for rows of its other targets."""

    def __init__(self, rows: Sequence[Result]) -> None:
        own = [row for row in rows if row.run_id and row.schedule != PEER]
        self._first: dict[str, str] = {}
        for row in own:
            self._first.setdefault(row.run_id, row.target)
        self._several = {row.run_id for row in own if row.target != self._first[row.run_id]}
        self._rows = {self._key(row): row for row in own if row.status == "ok" and self._is_first(row)}

    def _is_first(self, row: Result) -> bool:
        return row.target == self._first[row.run_id]

    @staticmethod
    def _key(row: Result) -> tuple[Any, ...]:
        return tuple(getattr(row, name) for name in ("run_id", "model", "scheme", "schedule", "test", "batch"))

    def line(self, row: Result) -> dict[str, Any]:
        """The row beside its run's first target."""
        several = row.run_id in self._several and row.schedule != PEER
        first = self._first.get(row.run_id) if row.run_id in self._several else None
        return {"first_target": first} | beside("across", self._rows.get(self._key(row)) if several else None, row)


class Leaders:
    """The fastest tuned case of ours on each device in each run, for rows of other engines."""

    def __init__(self, rows: Sequence[Result]) -> None:
        self._best: dict[tuple[Any, ...], Result] = {}
        for row in rows:
            if row.schedule == "tuned" and row.status == "ok" and row.samples_ns and row.run_id:
                other = self._best.get(self._key(row), row)
                slower = stats.median(row.samples_ns) > stats.median(other.samples_ns)
                self._best[self._key(row)] = other if slower else row

    @staticmethod
    def _key(row: Result) -> tuple[Any, ...]:
        same = ("run_id", "model", "scheme", "test", "batch", "n_threads")
        return (*(getattr(row, name) for name in same), device_key(row.device))

    def line(self, row: Result) -> dict[str, Any]:
        """By how much the fastest tuned case leads the row of another engine, and through which target."""
        ours = self._best.get(self._key(row)) if row.schedule == PEER else None
        return {"lead_target": ours.target if ours else None} | beside("lead", row, ours)
