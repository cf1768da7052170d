"""One row beside another: how many times as fast it is, with its interval, and whether that is called a difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan
from typing import Any, Literal

from tunebench import stats
from tunebench.report.probes import device_key
from tunebench.results import Result
from tunebench.stats import Interval

Effect = Literal["faster", "slower", "no clear difference", "too few samples", "noise floor unknown", "not interleaved"]
NAMES = ("speedup", "lead", "across", "change")
PEER = "library"  # the schedule of engines that bring their own kernels


@dataclass(frozen=True)
class Comparison:
    """How many times as fast a row is as its reference, and the noise floor below which that is no difference."""

    interval: Interval
    noise: float | None
    to_call: bool  # whether a difference may be called one


UNKNOWN = Comparison(Interval(nan, 0.0, inf), None, False)


def beside(reference: Result | None, row: Result | None, same_run: bool = True) -> Comparison | None:
    """`row` compared with `reference`; None where one of them is missing or has no figure.

    With `same_run` no difference between rows of two runs is called one, as they were not interleaved.
    """
    if reference is None or row is None or row.status != "ok" or reference.status != "ok":
        return None
    interleaved = bool(row.run_id) and reference.run_id == row.run_id
    interval = stats.ratio_interval(reference.samples_ns, row.samples_ns, interleaved)
    noise = max((each.noise for each in (reference, row) if each.noise is not None), default=None)
    return Comparison(interval, noise, not same_run or interleaved)


def columns(name: str, found: Sequence[Comparison | None]) -> list[dict[str, Any]]:
    """The columns of each comparison, which are all looked at together; empty where there is none.

    They are the ratio `name`, its interval `name_low` to `name_high`, `name_noise`, and `name_effect`, an `Effect`.
    """
    effects = iter(_effects([each for each in found if each]))
    return [_columns(name, each, next(effects) if each else None) for each in found]


def _columns(name: str, each: Comparison | None, effect: Effect | None) -> dict[str, Any]:
    interval = each.interval if each else Interval(nan, nan, nan)
    noise = nan if each is None or each.noise is None else each.noise
    bounds = {name: interval.ratio, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**bounds, f"{name}_noise": noise, f"{name}_effect": effect}


def _effects(found: Sequence[Comparison]) -> list[Effect]:
    """What each difference is called: none is faster or slower that is within the noise floor, or has none."""
    known = [each if each.to_call and each.noise is not None else UNKNOWN for each in found]
    called = stats.effects([each.interval for each in known], [each.noise for each in known])
    return [_effect(each, sign) for each, sign in zip(found, called, strict=True)]


def _effect(each: Comparison, called: int) -> Effect:
    if not each.to_call:
        return "not interleaved"
    if not each.interval.known:
        return "too few samples"
    if each.noise is None:
        return "noise floor unknown"
    return ("no clear difference", "faster", "slower")[called]


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
        return {"first_target": first, "across": beside(self._rows.get(self._key(row)) if several else None, row)}


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
        return {"lead_target": ours.target if ours else None, "lead": beside(row, ours)}
