"""Rows -> DataFrame: a line per row with its metrics, and beside it what it is compared with.

A case may have been measured several times; `latest` marks the newest row of each, and `change` is the speed of that
one over each other. A speed-up is always over the `default` schedule: of the same run, whose rows were interleaved on
one machine, or else of the run that `reference_run` names, and then its effect is `not interleaved`. What the best of
our tuned cases leads another engine by stands in that engine's line, as `lead`. In a run of several targets, `across`
is the speed of a target's case over that of the run's first target under the same schedule.
"""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import pandas as pd
from msgspec.structs import replace

from tunebench.report import compare, conditions, metrics, probes, runs
from tunebench.report.charts import records
from tunebench.report.compare import PEER, beside
from tunebench.report.labels import short_name
from tunebench.results import Result, Setting
from tunebench.spec import EngineName

CASE = ("model", "scheme", "schedule", "engine", "target", "device", "test", "batch", "n_threads")
PLAIN = (*CASE, "n_prompt", "n_gen", "n_depth", "status", "reason", "run_id", "test_time")
COUNTERS = ("weights", "kv_cache", "planned", "peak")
PLACES = ("target", "device", "n_threads")


def case_key(row: Result) -> tuple[Any, ...]:
    """What makes two rows the same case."""
    settings = frozenset((name, str(value)) for name, value in row.settings.items())
    return (*(getattr(row, name) for name in CASE), row.model_id, row.type_k, settings)


def build(rows: Sequence[Result], called: Mapping[str, str] | None = None) -> pd.DataFrame:
    """A line per row in the order of time, in base units; columns that have no value hold NaN or None.

    `called` has the names of the runs by their ids, where not only these rows have runs.
    """
    lines = _Lines(rows, called or runs.names(rows))
    built = [lines.line(row) for row in lines.rows]
    for name in compare.NAMES:
        for line, columns in zip(built, compare.columns(name, [line.pop(name) for line in built]), strict=True):
            line |= columns
    return pd.DataFrame(built, columns=None if built else [*PLAIN, "latest"]).astype({"latest": bool})


def newest(rows: Sequence[Result], built: pd.DataFrame) -> list[tuple[Result, dict[str, Any]]]:
    """The newest row of each case, and its line in the frame `built` of `rows`."""
    return [(row, line) for row, line in zip(_by_time(rows), records(built), strict=True) if line["latest"]]


def _by_time(rows: Sequence[Result]) -> list[Result]:
    return sorted(rows, key=lambda row: row.test_time)


class _Lines:
    """What the line of a row needs to know of the others."""

    # In the order of time; of two rows with the same time the later in the file is the newer.
    def __init__(self, rows: Sequence[Result], called: Mapping[str, str]) -> None:
        self.rows, self._called = _by_time(rows), called
        usable = [row for row in self.rows if row.status == "ok" and row.run_id]
        self._of_run = {(row.run_id, case_key(row)): row for row in usable}
        self._of_any_run = {case_key(row): row for row in usable}
        self._latest = {case_key(row): row for row in self.rows}
        self._several = _varying(self.rows)
        self._settings = _settings_that_differ(self.rows)
        self._probes = probes.best(self.rows)
        self._across = compare.Across(self.rows)
        self._leaders = compare.Leaders(self.rows)

    def line(self, row: Result) -> dict[str, Any]:
        """All columns of a row."""
        line: dict[str, Any] = {name: getattr(row, name) for name in PLAIN}
        line |= {
            "model_id": row.model_id,
            "run": self._called[row.run_id],
            "latest": self._latest[case_key(row)] is row,
        }
        line |= {"arm": row.engine if row.schedule == PEER else row.schedule, "phase": metrics.phase(row)}
        line |= {"place": _place(row, self._several), "test_label": self._test_label(row)}
        line |= {"model_label": short_name(row.model), "n_samples": len(row.samples_ns)}
        line |= {"n_throttled": len(row.throttled), "conditions": conditions.described(row)}
        line |= {"noise": nan if row.noise is None else row.noise}
        line |= {f"{name}_counter": row.memory[name].counter if name in row.memory else None for name in COUNTERS}
        line |= self._limits(row)
        return line | self._speedup(row) | self._change(row) | self._across.line(row) | self._leaders.line(row)

    def _test_label(self, row: Result) -> str:
        batch = [f"batch {row.batch}"] if row.batch > 1 else []
        settings = _settings(row)
        differing = [f"{name} {settings.get(name, 'unset')}" for name in self._settings[_without_settings(row)]]
        return ", ".join([row.test, *batch, *differing])

    def _limits(self, row: Result) -> dict[str, Any]:
        """Every metric, its shares of the best that any probe of the row's device reached, and where that was."""
        best = self._probes[probes.device_key(row.device)]
        row = replace(row, probe={name: found.rate for name, found in best.items()})
        line: dict[str, Any] = {}
        line |= metrics.evaluate(row) if row.status == "ok" else dict.fromkeys(metrics.load())
        for column, name in (("read_probe", metrics.read_probe(row)), ("matrix_probe", metrics.matrix_probe(row))):
            found = best.get(name)
            line[column] = found.rate if found else None
            line[f"{column}_unit"] = probes.unit(name)
            line[f"{column}_at"] = f"{probes.said(name)}, {probes.through(found.row)}" if found else None
            line[f"{column}_run"] = self._called[found.row.run_id] if found else None
        return line

    def _speedup(self, row: Result) -> dict[str, Any]:
        key = _reference_key(row)
        reference = self._of_run.get((row.run_id, key)) or (self._of_any_run.get(key) if row.run_id else None)
        speedup = beside(reference, row)
        if reference is None or speedup is None:
            names = ("reference_tokens_per_s", "reference_tokens_per_s_spread")
            return {"speedup": None, "reference": None, "reference_run": None} | dict.fromkeys(names, nan)
        before = metrics.evaluate(reference)
        return {
            "speedup": speedup,
            "reference": "default",
            "reference_run": self._called[reference.run_id],
            "reference_tokens_per_s": before["tokens_per_s"],
            "reference_tokens_per_s_spread": before["tokens_per_s_spread"],
        }

    def _change(self, row: Result) -> dict[str, Any]:
        """The latest row of the same case beside this one, for all but the latest."""
        newer = self._latest[case_key(row)]
        return {"change": beside(row, newer, same_run=False) if newer is not row else None}


def _varying(rows: Sequence[Result]) -> list[str]:
    """What must be said of a place because the measured rows differ in it, but for a target's only device."""
    ran = [row for row in rows if row.status == "ok"]
    targets = {_target(row) for row in ran}
    if len(targets) > 1 and len({(_target(row), row.device, row.n_threads) for row in ran}) == len(targets):
        return ["target"]
    return [name for name in PLACES if len({getattr(row, name) for row in ran}) > 1]


def _target(row: Result) -> str:
    return f"{row.target} in a browser" if row.engine == EngineName.BROWSER else row.target


def _place(row: Result, several: list[str]) -> str:
    words = {
        "target": _target(row),
        "device": row.device,
        "n_threads": f"{row.n_threads} threads" if row.n_threads else "",
    }
    return ", ".join(words[name] for name in several if words[name])


def _settings(row: Result) -> dict[str, Setting]:
    return {"type_k": row.type_k, **row.settings}


def _without_settings(row: Result) -> tuple[Any, ...]:
    return case_key(replace(row, settings={}, type_k=""))


def _settings_that_differ(rows: Sequence[Result]) -> dict[tuple[Any, ...], list[str]]:
    """The names of the settings that differ between rows that are otherwise the same case, by that case."""
    found: dict[tuple[Any, ...], list[dict[str, Setting]]] = {}
    for row in rows:
        found.setdefault(_without_settings(row), []).append(_settings(row))
    return {
        key: [name for name in dict.fromkeys(name for each in settings for name in each) if _several(settings, name)]
        for key, settings in found.items()
    }


def _several(settings: Sequence[dict[str, Setting]], name: str) -> bool:
    return any(each.get(name) != settings[0].get(name) for each in settings)


def _reference_key(row: Result) -> tuple[Any, ...]:
    """The case that a tuned row is compared with: the same in all but the schedule. Other rows have none."""
    return case_key(replace(row, schedule="default")) if row.schedule not in (PEER, "default") else ()
