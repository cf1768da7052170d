"""What the rows say in a sentence, what they ran on, and what makes them hard to trust."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from tunebench import stats
from tunebench.report import metrics, words
from tunebench.report.charts import records
from tunebench.report.frame import short_name
from tunebench.report.tables import Table
from tunebench.results import Result, TuneResult

MOST_VALUES = 3


def headline(frame: pd.DataFrame, tunes: Sequence[TuneResult]) -> list[str]:
    """One or two sentences per question: does tuning pay, what did it decide, what did it cost."""
    rows = [row for row in records(frame) if row["reference"] is not None]
    if not rows:
        return _leads(frame) or [
            "No speed-up is reported: no tuned case was measured in the same run as its default one. "
            "Bench both schedules in one run to compare them."
        ]
    found = [_phase(rows, phase) for phase in ("decode", "prefill", "both")]
    found += _leads(frame)
    return [sentence for sentence in (*found, _kernels(tunes), _cost(tunes)) if sentence]


def _phase(rows: list[dict[str, Any]], phase: str) -> str:
    rows = [row for row in rows if row["phase"] == phase]
    if not rows:
        return ""
    name = {"both": "Prefill and decode together"}.get(phase, phase.capitalize())
    faster = [row for row in rows if row["effect"] == "faster"]
    slower = sum(row["effect"] == "slower" for row in rows)
    also = f" {slower} {_is(slower)} slower." if slower else ""
    unknown = [row for row in rows if row["effect"] == "too few samples"]
    if len(unknown) == len(rows):
        middle = words.ratio(stats.median([row["speedup"] for row in rows]))
        return f"{name}: {middle} over default at the median, without an interval: too few samples."
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


def _leads(frame: pd.DataFrame) -> list[str]:
    """How the tuned cases stand against each other engine."""
    rows = [row for row in records(frame) if row["lead"] is not None]
    return [
        f"Against {engine}: " + "; ".join(_lead(row) for row in rows if row["engine"] == engine) + "."
        for engine in dict.fromkeys(row["engine"] for row in rows)
    ]


def _lead(row: dict[str, Any]) -> str:
    figure = words.ratio(row["lead"], row["lead_low"], row["lead_high"])
    return f"{row['model_label']} {row['scheme']} {row['test_label']} {figure}"


def _kernels(tunes: Sequence[TuneResult]) -> str:
    decisions = [stats.kernel_decision(kernel).decision for tune in tunes for kernel in tune.kernels]
    if not decisions:
        return ""
    counts = {name: decisions.count(name) for name in ("promoted", "kept default", "inconclusive")}
    return f"Of {len(decisions)} kernels, " + ", ".join(f"{count} {name}" for name, count in counts.items()) + "."


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
    """The machine's own figures, measured beside the cases."""
    reads = [words.per_s(metrics.read_probe(row), "B") for row in rows]
    flops = [words.per_s(row.probe.get("flops_per_s"), "flop") for row in rows]
    noise = [words.percent(row.noise) if row.noise is not None else words.MISSING for row in rows]
    ints = [words.per_s(row.probe.get("int8_ops_per_s"), "op") for row in rows]
    halves = [words.per_s(row.probe.get("f16_flops_per_s"), "flop") for row in rows]
    lines = [("bandwidth, measured", reads), ("float32 matrix rate, measured", flops)]
    lines += [("float16 matrix rate, measured", halves), ("int8 matrix rate, measured", ints)]
    lines += [("noise floor (A/A)", noise)]
    lines += [("targets", [f"{row.target} on {row.device}" for row in rows])]
    threads = [f"{row.n_threads} threads" if row.n_threads else "" for row in rows]
    lines += [("threads", threads), ("runs", [row.run_id for row in rows])]
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


def cautions(latest: Sequence[Result], frame: pd.DataFrame) -> list[str]:
    """Stability warnings of the latest rows, and tuned rows that could not be compared."""
    found = []
    for row in latest:
        who = f"{short_name(row.model)} {row.scheme} {row.test}, {row.schedule} ({row.engine})"
        if row.status == "ok":
            found += [f"{who}: {warning}" for warning in stats.warnings(row.samples_ns, row.warmup_ns)]
    for line in records(frame):
        if line["status"] == "ok" and line["arm"] not in ("default", line["engine"]) and line["reference"] is None:
            who = f"{line['model_label']} {line['scheme']} {line['test_label']}, {line['arm']}"
            run = line["run_id"] or "without a name"
            found.append(f"{who}: no default figure in run {run}; bench both in one run, or see what was left out")
    if any(row.status == "ok" and row.noise is None for row in latest):
        found.append("the noise floor was not measured for every row: small speed-ups may be noise")
    return found
