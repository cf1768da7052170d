"""The tables of the benched cases."""

from typing import Any

import pandas as pd

from tunebench.report import conditions, words
from tunebench.report.charts import records
from tunebench.report.compare import PEER
from tunebench.report.frame import COUNTERS
from tunebench.report.runs import earlier
from tunebench.report.table import Table
from tunebench.spec import EngineName


def build(frame: pd.DataFrame) -> list[Table]:
    """The tables of a frame, in the order of the report; all but one are of the latest row of each case."""
    every = sorted(records(frame), key=_order)
    rows = [row for row in every if row["latest"]]
    tables = [summary(rows), targets(rows), engines(rows, every), earlier(every), memory(rows)]
    return [*tables, conditions.table(rows), left_out(rows)]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    lengths = (row["n_prompt"], row["n_gen"], row["n_depth"], row["batch"])
    return (row["model_label"], row["place"], row["scheme"], row["phase"] != "prefill", *lengths)


def summary(rows: list[dict[str, Any]]) -> Table:
    """Default against tuned, a line per model, scheme and test."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["schedule"] != PEER and row["status"] == "ok":
            cases.setdefault(_line_key(row), {})[row["schedule"]] = row
    lines = [_summary_line(arms, name) for arms in cases.values() for name in _shown(arms)]
    return Table(
        "summary",
        "Summary",
        ("model", "scheme", "test", "default", "tuned", "over default", "share of machine", "peak memory"),
        lines,
        "Medians ± half the interquartile range. *Over default* is the ratio of the times of the tuned and "
        f"the default schedule, with its {words.INTERVAL}, interleaved in the same run unless it says otherwise. "
        "*Share of machine* (of the bandwidth for tg, of the rate of matrix products for pp; in brackets the probe "
        "that reached most on that device, and through what) and *peak memory* (with its counter) are those of the "
        "tuned case where there is one. Tokenisation and sampling are not included.",
    )


def _shown(arms: dict[str, dict[str, Any]]) -> list[str]:
    """The arms that have a line: those beside whose figures the default one stands take that with them."""
    tuned = [name for name in arms if name != "default"]
    beside = any(arms[name]["reference_run"] == arms["default"]["run"] for name in tuned if "default" in arms)
    return [name for name in arms if name != "default" or not beside]


def _summary_line(arms: dict[str, dict[str, Any]], name: str) -> tuple[str, ...]:
    row = arms[name]
    default, tuned = words.MISSING, words.MISSING
    if name == "default":
        default = words.measured(row)
    else:
        tuned = words.measured(row)
        default = words.rate(row["reference_tokens_per_s"], row["reference_tokens_per_s_spread"])
    return (*words.who(row), row["test_label"], default, tuned, _gain(row), _share(row), _count(row, "peak"))


def _gain(row: dict[str, Any]) -> str:
    if row["reference"] is None:
        return words.MISSING if row["schedule"] == "default" else "no default figure"
    return words.over_default(row)


def _share(row: dict[str, Any]) -> str:
    for share, probe in (("read_share", "read_probe"), ("matrix_share", "matrix_probe")):
        if row[share] is not None:
            limit = words.per_s(row[probe], row[f"{probe}_unit"])
            return f"{words.percent(row[share])} of {limit} ({row[f'{probe}_at']})"
    return words.MISSING


def targets(rows: list[dict[str, Any]]) -> Table:
    """One model on every target of a run, and its speed over that on the run's first target."""
    lines = [
        (
            row["model_label"],
            row["scheme"],
            row["test_label"],
            row["schedule"],
            f"{row['target']} ({_on(row)})",
            words.measured(row),
            _share(row),
            words.MISSING if row["across"] is None else _across(row),
        )
        for row in rows
        if row["first_target"] and row["status"] == "ok" and row["schedule"] != PEER
    ]
    columns = ("model", "scheme", "test", "schedule", "target", "throughput", "share of machine", "over the reference")
    note = (
        "The same weights and prompts on every target, measured interleaved in one run. The reference is the run's "
        f"first target, under the same schedule; with its {words.INTERVAL}."
    )
    return Table("targets", "Targets", columns, lines, note)


def _on(row: dict[str, Any]) -> str:
    return f"{row['engine']}, {row['device']}" if row["engine"] == EngineName.BROWSER else str(row["device"])


def _across(row: dict[str, Any]) -> str:
    if row["target"] == row["first_target"] and row["engine"] != EngineName.BROWSER:
        return "reference"
    return f"{words.compared(row, 'across')} of {row['first_target']}"


def engines(rows: list[dict[str, Any]], every: list[dict[str, Any]]) -> Table:
    """The rows of other engines, and by how much the best tuned case leads each; `every` has those of earlier runs."""
    lines = [
        (
            *words.who(row),
            row["test_label"],
            row["arm"],
            words.measured(row),
            _share(row),
            _beside(row, every),
            words.MISSING if row["lead"] is None else f"{words.compared(row, 'lead')}, {row['lead_target']}",
        )
        for row in rows
        if row["schedule"] == PEER and row["status"] == "ok"
    ]
    columns = (
        "model",
        "scheme",
        "test",
        "engine",
        "throughput",
        "share of machine",
        "tuned beside it",
        "tuned over it",
    )
    note = (
        "The same weights in every engine, measured interleaved in one run, where the last column has a ratio: of the "
        f"fastest of our targets on the same device, with its {words.INTERVAL}. An engine that has no such "
        "quantization holds them dequantized: see their size under Memory. Rows of other runs, or with another scheme, "
        "are not compared."
    )
    return Table("engines", "Other engines", columns, lines, note)


def _beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    same = ("run_id", "model", "test", "batch", "n_threads", "status")
    found = [other for other in rows if other["schedule"] == "tuned" and all(other[name] == row[name] for name in same)]
    if not row["run_id"] or not found:
        return words.MISSING
    several = len({other["target"] for other in found}) > 1
    where = [f"{other['scheme']}, {other['target']}" if several else other["scheme"] for other in found]
    return ", ".join(f"{words.rate(other['tokens_per_s'])} ({name})" for other, name in zip(found, where, strict=True))


def memory(rows: list[dict[str, Any]]) -> Table:
    """Each counter of memory, and where it came from."""
    cases: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["status"] == "ok" and any(row[f"{name}_counter"] for name in COUNTERS):
            counts = (_count(row, name) for name in COUNTERS)
            cases.setdefault((*words.who(row), *counts), []).append(f"{row['test_label']} {row['arm']}")
    lines = [(*key[:2], ", ".join(tests), *key[2:]) for key, tests in cases.items()]
    columns = ("model", "scheme", "test", "weights", "KV cache", "planned in all", "peak")
    return Table("memory", "Memory", columns, lines, "In brackets the counter that the figure came from.")


def _count(row: dict[str, Any], name: str) -> str:
    counter = row[f"{name}_counter"]
    if row[f"{name}_bytes"] is None:
        return f"not counted ({counter})" if counter else "no counter"
    return f"{words.size(row[f'{name}_bytes'])} ({counter})"


def left_out(rows: list[dict[str, Any]]) -> Table:
    """The cases that have no figure, and why."""
    lines = [
        (*words.who(row), row["test_label"], row["arm"], row["target"], row["status"].replace("_", " "), row["reason"])
        for row in rows
        if row["status"] != "ok"
    ]
    columns = ("model", "scheme", "test", "arm", "target", "status", "reason")
    return Table("left_out", "Failed and not run", columns, lines)


def _line_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "scheme", "engine", "test_label", "n_threads", "target", "device"))
