"""Rows -> DataFrame: a line per case with its metrics, and its speed-up over the named reference.

A case may have been measured several times; `latest` marks the newest row of each. A speed-up is computed only
between rows of one run, which were interleaved on one machine, and always over the `default` schedule. What the
tuned case leads another engine by stands in that engine's line, as `lead`. In a run of several targets, `across` is
the speed of a target's case over that of the run's first target under the same schedule.
"""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from msgspec.structs import replace

from tunebench import stats
from tunebench.report import metrics
from tunebench.results import Result
from tunebench.spec import EngineName
from tunebench.stats import Decided

CASE = ("model", "scheme", "schedule", "engine", "target", "device", "test", "batch", "n_threads")
PLAIN = (*CASE, "n_prompt", "n_gen", "n_depth", "status", "reason", "run_id", "test_time")
PEER = "library"  # the schedule of engines that bring their own kernels
COUNTERS = ("weights", "kv_cache", "planned", "peak")
PLACES = ("target", "device", "n_threads")


def case_key(row: Result) -> tuple[Any, ...]:
    """What makes two rows the same case."""
    settings = frozenset((name, str(value)) for name, value in row.settings.items())
    return (*_named(row), row.model_id, row.type_k, settings)


def _named(row: Result) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in CASE)


def latest(rows: Sequence[Result]) -> list[Result]:
    """The newest row of each case; of two with the same time the later in the file."""
    return list({case_key(row): row for row in _by_time(rows)}.values())


def build(rows: Sequence[Result]) -> pd.DataFrame:
    """A line per row in the order of time, in base units; columns that have no value hold NaN or None."""
    ordered = _by_time(rows)
    newest = set(map(id, latest(rows)))
    comparable = [row for row in ordered if row.status == "ok" and row.run_id]
    references = {(row.run_id, case_key(row)): row for row in comparable}
    ours = {(row.run_id, _named(row)): row for row in comparable}
    several = _varying(ordered)
    across = _Across(ordered)
    lines = [
        _line(row, references.get((row.run_id, _reference_key(row))), several)
        | _lead(row, ours.get((row.run_id, _tuned_key(row))))
        | across.line(row)
        | {"latest": id(row) in newest}
        for row in ordered
    ]
    return pd.DataFrame(lines, columns=None if lines else [*PLAIN, "latest"]).astype({"latest": bool})


def _by_time(rows: Sequence[Result]) -> list[Result]:
    return sorted(rows, key=lambda row: row.test_time)


def _varying(rows: Sequence[Result]) -> list[str]:
    """What must be said of a place because the measured rows differ in it, but for a target's only device."""
    ran = [row for row in rows if row.status == "ok"]
    targets = {_target(row) for row in ran}
    if len(targets) > 1 and len({(_target(row), row.device, row.n_threads) for row in ran}) == len(targets):
        return ["target"]
    return [name for name in PLACES if len({getattr(row, name) for row in ran}) > 1]


def _target(row: Result) -> str:
    return f"{row.target} in a browser" if row.engine == EngineName.BROWSER else row.target


def _line(row: Result, reference: Result | None, several: list[str]) -> dict[str, Any]:
    line: dict[str, Any] = {name: getattr(row, name) for name in PLAIN}
    line |= {"arm": row.engine if row.schedule == PEER else row.schedule, "phase": metrics.phase(row)}
    line |= {"place": _place(row, several), "test_label": _test_label(row)}
    line |= {"model_label": short_name(row.model)}
    line |= {"n_samples": len(row.samples_ns), "noise": nan if row.noise is None else row.noise}
    line |= {"read_probe": metrics.read_probe(row), "matrix_probe": metrics.matrix_probe(row)}
    line |= {"matrix_unit": "op" if row.multiplies == "int8" else "flop"}
    line |= {f"{name}_counter": row.memory[name].counter if name in row.memory else None for name in COUNTERS}
    usable = row.status == "ok"
    line |= metrics.evaluate(row) if usable else dict.fromkeys(metrics.load())
    return line | _speedup(row, reference if usable else None)


def short_name(model: str) -> str:
    """The name of a model, which may be given as the path of its JSON."""
    return Path(model).name.removesuffix(".json")


def _place(row: Result, several: list[str]) -> str:
    words = {
        "target": _target(row),
        "device": row.device,
        "n_threads": f"{row.n_threads} threads" if row.n_threads else "",
    }
    return ", ".join(words[name] for name in several if words[name])


def _test_label(row: Result) -> str:
    return row.test if row.batch == 1 else f"{row.test}, batch {row.batch}"


def _reference_key(row: Result) -> tuple[Any, ...]:
    """The case that a tuned row is compared with: the same in all but the schedule. Other rows have none."""
    return case_key(replace(row, schedule="default")) if row.schedule not in (PEER, "default") else ()


def _tuned_key(row: Result) -> tuple[Any, ...]:
    """Our tuned case beside a row of another engine. Other rows have none."""
    ours = {"engine": EngineName.TVM, "schedule": "tuned"}
    return tuple(ours.get(name, getattr(row, name)) for name in CASE) if row.schedule == PEER else ()


class _Across:
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
        line = {"first_target": self._first.get(row.run_id) if row.run_id in self._several else None}
        reference = self._rows.get(self._key(row))
        if reference is None or row.status != "ok" or line["first_target"] is None or row.schedule == PEER:
            return line | dict.fromkeys(("across", "across_low", "across_high"), nan)
        interval = stats.ratio_interval(reference.samples_ns, row.samples_ns)
        return line | {"across": interval.ratio, "across_low": interval.low, "across_high": interval.high}


def _lead(row: Result, tuned: Result | None) -> dict[str, float]:
    if tuned is None or row.status != "ok":
        return dict.fromkeys(("lead", "lead_low", "lead_high"), nan)
    interval = stats.ratio_interval(row.samples_ns, tuned.samples_ns)
    return {"lead": interval.ratio, "lead_low": interval.low, "lead_high": interval.high}


def _speedup(row: Result, reference: Result | None) -> dict[str, Any]:
    if reference is None:
        empty = ("speedup", "speedup_low", "speedup_high", "reference_tokens_per_s", "reference_tokens_per_s_spread")
        return dict.fromkeys(empty, nan) | {"reference": None, "effect": None}
    noise = row.noise if row.noise is not None else reference.noise or 0.0
    decided = stats.decide(reference.samples_ns, row.samples_ns, noise)
    before = metrics.evaluate(reference)
    return {
        "speedup": decided.interval.ratio,
        "speedup_low": decided.interval.low,
        "speedup_high": decided.interval.high,
        "reference": "default",
        "reference_tokens_per_s": before["tokens_per_s"],
        "reference_tokens_per_s_spread": before["tokens_per_s_spread"],
        "effect": _effect(decided, noise),
    }


def _effect(decided: Decided, noise: float) -> str:
    interval = decided.interval
    if not interval.known:
        return "too few samples"
    if decided.decision == "promoted":
        return "faster"
    return "slower" if interval.high < 1 and interval.ratio < 1 / (1 + noise) else "no clear difference"
