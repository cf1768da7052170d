"""What the rows say in a sentence, what they ran on, and what makes them hard to trust."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tunebench import stats
from tunebench.report import words
from tunebench.report.charts import records
from tunebench.report.compare import PEER
from tunebench.report.kernel_tables import latest_tunes
from tunebench.report.steps import decisions
from tunebench.report.table import Table
from tunebench.results import Result, TuneResult

MOST_VALUES = 3


def headline(frame: pd.DataFrame, tunes: Sequence[TuneResult]) -> list[str]:
    """One or two sentences per question: does tuning pay, what did it decide, what did it cost."""
    compared = [row for row in records(frame) if row["reference"] is not None]
    rows = [row for row in compared if row["speedup_effect"] != "not interleaved"]
    found = [_phase(rows, phase) for phase in ("decode", "prefill", "both")] + [_elsewhere(compared)] + _leads(frame)
    none = (
        "No speed-up is reported: no tuned case was measured in the same run as its default one. "
        "Bench both schedules in one run to compare them."
    )
    found = [sentence for sentence in found if sentence] or [none]
    return [sentence for sentence in (*found, _kernels(latest_tunes(tunes)), _cost(tunes)) if sentence]


def _phase(rows: list[dict[str, Any]], phase: str) -> str:
    rows = [row for row in rows if row["phase"] == phase]
    if not rows:
        return ""
    name = {"both": "Prefill and decode together"}.get(phase, phase.capitalize())
    faster = [row for row in rows if row["speedup_effect"] == "faster"]
    slower = sum(row["speedup_effect"] == "slower" for row in rows)
    also = f" {slower} {_is(slower)} slower." if slower else ""
    uncalled = {row["speedup_effect"] for row in rows} & {"too few samples", "noise floor unknown"}
    if all(row["speedup_effect"] in uncalled for row in rows):
        middle = words.ratio(stats.median([row["speedup"] for row in rows]))
        return (
            f"{name}: {middle} over default at the median, and not called a difference: {', '.join(sorted(uncalled))}."
        )
    if not faster:
        return f"{name}: no case of {len(rows)} is clearly faster with tuning.{also}"
    best = max(faster, key=lambda row: float(row["speedup"]))
    gain = words.ratio(best["speedup"], best["speedup_low"], best["speedup_high"])
    what = f"{best['model_label']} {best['scheme']} {best['test_label']}"
    if len(rows) == 1:
        return f"{name}: {what} is {gain} as fast with tuning as by default."
    middle = words.ratio(stats.median([row["speedup"] for row in rows]))
    return (
        f"{name}: {len(faster)} of {len(rows)} {_is(len(faster))} faster with tuning over default, "
        f"at the median {middle}; the best is {what}, {gain}.{also}"
    )


def _elsewhere(rows: list[dict[str, Any]]) -> str:
    """What stands beside the default figure of another run."""
    found = [row for row in rows if row["speedup_effect"] == "not interleaved"]
    if not found:
        return ""
    named = "; ".join(
        f"{row['model_label']} {row['scheme']} {row['test_label']} {words.ratio(row['speedup'])} (run "
        f"{row['reference_run']})"
        for row in found[:MOST_VALUES]
    )
    more = f"; and {len(found) - MOST_VALUES} more" if len(found) > MOST_VALUES else ""
    return f"Beside a default figure of another run, not interleaved and so not called a difference: {named}{more}."


def _leads(frame: pd.DataFrame) -> list[str]:
    """How the tuned cases stand against each other engine."""
    rows = [row for row in records(frame) if row["lead"] is not None]
    return [
        f"Against {engine}: " + "; ".join(_lead(row) for row in rows if row["engine"] == engine) + "."
        for engine in dict.fromkeys(row["engine"] for row in rows)
    ]


def _lead(row: dict[str, Any]) -> str:
    through = f" through {row['lead_target']}" if row["lead_target"] != row["target"] else ""
    return f"{row['model_label']} {row['scheme']} {row['test_label']} {words.compared(row, 'lead')}{through}"


def _kernels(tunes: Sequence[TuneResult]) -> str:
    said = decisions([kernel for tune in tunes for kernel in tune.kernels])
    return f"{said}." if said else ""


def _cost(tunes: Sequence[TuneResult]) -> str:
    total = sum(tune.cost_s.get("total", 0.0) for tune in tunes)
    trials = sum(tune.trials for tune in tunes)
    return f"Tuning took {words.seconds(total)} and {trials} trials." if total else ""


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def environment(rows: Sequence[Result], tunes: Sequence[TuneResult]) -> Table:
    """Where the rows were measured; a value that differs between rows is listed with its range."""
    seen: dict[str, list[Any]] = {}
    for data in [row.environment for row in rows] + [tune.environment for tune in tunes]:
        for name, value in _flat(data):
            seen.setdefault(name, []).append(value)
    lines = [(name.replace("_", " "), _values(values)) for name, values in seen.items()]
    columns = ("of the run", "value")
    return Table("environment", "Environment", columns, _measured(rows) + lines)


def _measured(rows: Sequence[Result]) -> list[tuple[str, str]]:
    """What the rows themselves say of where they were measured."""
    noise = [words.percent(row.noise) if row.noise is not None else words.MISSING for row in rows]
    threads = [f"{row.n_threads} threads" if row.n_threads else "" for row in rows]
    lines = [("noise floor (A/A)", noise), ("threads", threads)]
    lines += [("targets", [f"{row.target} on {row.device}" for row in rows])]
    return [(name, _values([value for value in values if value not in ("", words.MISSING)])) for name, values in lines]


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in data.items():
        flat += _flat(value, f"{prefix}{name}: ") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat


def _values(values: list[Any]) -> str:
    distinct = list(
        dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values if value is not None)
    )
    if len(distinct) <= MOST_VALUES:
        return ", ".join(distinct) or "not measured"
    if all(isinstance(value, (int, float)) for value in values):
        return f"{min(values):g} to {max(values):g}"
    return f"{', '.join(distinct[:MOST_VALUES])} and {len(distinct) - MOST_VALUES} more"


def cautions(newest: Sequence[tuple[Result, dict[str, Any]]]) -> list[str]:
    """Stability warnings of the latest rows, and tuned rows that could not be compared."""
    found = []
    measured = [(row, line) for row, line in newest if row.status == "ok"]
    for row, line in measured:
        warnings = [*_throttled(row), *stats.warnings(row.samples_ns, row.warmup_ns), *_uncompared(line)]
        who = f"{' '.join(words.who(line))} {line['test_label']}, {row.schedule} ({row.engine})"
        found += [f"{who}: {warning}" for warning in warnings]
    if any(row.noise is None for row, _ in measured):
        found.append("the noise floor was not measured for every row: where it is unknown, no difference is called")
    return found


def _throttled(row: Result) -> list[str]:
    count = f"{len(row.throttled)} of {words.whole(len(row.samples_ns), 'sample')}"
    cure = "let it cool down, or see what limits its power"
    return [f"{count} taken while the device was throttled; {cure}"] if row.throttled else []


def _uncompared(line: dict[str, Any]) -> list[str]:
    """Of a tuned line of a frame: that its default figure is missing, or of another run."""
    if line["schedule"] in (PEER, "default"):
        return []
    if line["reference"] is None:
        return [f"no default figure in run {line['run']}; bench both in one run, or see what was left out"]
    if line["speedup_effect"] == "not interleaved":
        return [f"its reference is from run {line['reference_run']}: not interleaved; bench both in one run"]
    return []
