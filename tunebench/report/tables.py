"""The tables of the report, as words: each is built once and rendered as Markdown, HTML or for the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tunebench import stats
from tunebench.report import metrics, words
from tunebench.report.charts import digits, records
from tunebench.report.frame import COUNTERS, PEER, short_name
from tunebench.results import Result, TuneResult
from tunebench.spec import EngineName, Kernel

MISSES = 4  # kernels named in a line of the coverage table


@dataclass(frozen=True)
class Table:
    """A titled table of words; `note` says how to read it. Without rows it is left out."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]] = ()
    note: str = ""


def build(frame: pd.DataFrame, latest: Sequence[Result], tunes: Sequence[TuneResult]) -> list[Table]:
    """Every table that has a row, in the order of the report. `frame` holds the latest row of each case."""
    rows = sorted(records(frame), key=_order)
    tables = [summary(rows), targets(rows), engines(rows), memory(rows), tuning_cost(rows, tunes), kernels(tunes)]
    tables += [coverage(latest), left_out(rows)]
    return [table for table in tables if table.rows]


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
        "Medians ± half the interquartile range. *Over default* is the ratio of the median times of the tuned and "
        "the default schedule, measured interleaved in the same run, with its 95 % interval. *Share of machine* (of "
        "the measured read bandwidth for tg, of the measured matrix rate for pp) and *peak memory* are those of the "
        "tuned case where there is one. Tokenisation and sampling are not included.",
    )


def _shown(arms: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name in arms if name != "default"] or ["default"]


def _summary_line(arms: dict[str, dict[str, Any]], name: str) -> tuple[str, ...]:
    row = arms[name]
    default, tuned = words.MISSING, words.MISSING
    if name == "default":
        default = words.rate(row["tokens_per_s"], row["tokens_per_s_spread"])
    else:
        tuned = words.rate(row["tokens_per_s"], row["tokens_per_s_spread"])
        default = words.rate(row["reference_tokens_per_s"], row["reference_tokens_per_s_spread"])
    return (*_who(row), row["test_label"], default, tuned, _gain(row), _share(row), words.size(row["peak_bytes"]))


def _gain(row: dict[str, Any]) -> str:
    if row["reference"] is None:
        return words.MISSING if row["schedule"] == "default" else "no default figure in this run"
    figure = words.ratio(row["speedup"], row["speedup_low"], row["speedup_high"])
    return figure if row["effect"] in ("faster", "slower") else f"{figure} {row['effect']}"


def _share(row: dict[str, Any]) -> str:
    if row["read_share"] is not None:
        return f"{words.percent(row['read_share'])} of {words.per_s(row['read_probe'], 'B')}"
    if row["matrix_share"] is not None:
        return f"{words.percent(row['matrix_share'])} of {words.per_s(row['matrix_probe'], row['matrix_unit'])}"
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
            words.rate(row["tokens_per_s"], row["tokens_per_s_spread"]),
            _share(row),
            words.MISSING if row["across"] is None else _across(row),
        )
        for row in rows
        if row["first_target"] and row["status"] == "ok" and row["schedule"] != PEER
    ]
    columns = ("model", "scheme", "test", "schedule", "target", "throughput", "share of machine", "over the reference")
    note = (
        "The same weights and prompts on every target, measured interleaved in one run. The reference is the run's "
        "first target, under the same schedule; the interval is 95 %."
    )
    return Table("targets", "Targets", columns, lines, note)


def _on(row: dict[str, Any]) -> str:
    return f"{row['engine']}, {row['device']}" if row["engine"] == EngineName.BROWSER else str(row["device"])


def _across(row: dict[str, Any]) -> str:
    if row["target"] == row["first_target"] and row["engine"] != EngineName.BROWSER:
        return "reference"
    return f"{words.ratio(row['across'], row['across_low'], row['across_high'])} of {row['first_target']}"


def engines(rows: list[dict[str, Any]]) -> Table:
    """The rows of other engines, and by how much the tuned case leads each of them."""
    lines = [
        (
            *_who(row),
            row["test_label"],
            row["arm"],
            words.rate(row["tokens_per_s"], row["tokens_per_s_spread"]),
            _share(row),
            _beside(row, rows),
            words.ratio(row["lead"], row["lead_low"], row["lead_high"]),
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
        "The same weights in every engine, measured interleaved in one run, where the last column has a ratio; its "
        "interval is 95 %. An engine that has no such quantization holds them dequantized: see their size under "
        "Memory. Rows of other runs, or with another scheme, are not compared."
    )
    return Table("engines", "Other engines", columns, lines, note)


def _beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    same = ("run_id", "model", "test", "batch", "n_threads", "status")
    found = [other for other in rows if other["arm"] == "tuned" and all(other[name] == row[name] for name in same)]
    if not row["run_id"] or not found:
        return words.MISSING
    return ", ".join(f"{words.rate(other['tokens_per_s'])} ({other['scheme']})" for other in found)


def memory(rows: list[dict[str, Any]]) -> Table:
    """Each counter of memory, and where it came from."""
    cases: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["status"] == "ok" and any(row[f"{name}_counter"] for name in COUNTERS):
            counts = (_count(row, name) for name in COUNTERS)
            cases.setdefault((*_who(row), *counts), []).append(f"{row['test_label']} {row['arm']}")
    lines = [(*key[:2], ", ".join(tests), *key[2:]) for key, tests in cases.items()]
    columns = ("model", "scheme", "test", "weights", "KV cache", "planned in all", "peak")
    return Table("memory", "Memory", columns, lines, "In brackets the counter that the figure came from.")


def _count(row: dict[str, Any], name: str) -> str:
    counter = row[f"{name}_counter"]
    if row[f"{name}_bytes"] is None:
        return f"none ({counter})" if counter else "no counter"
    return f"{words.size(row[f'{name}_bytes'])} ({counter})"


def tuning_cost(rows: list[dict[str, Any]], tunes: Sequence[TuneResult]) -> Table:
    """What each tuning run cost, and after how many tokens it has paid for itself."""
    lines = [_cost_line(tune, rows) for tune in tunes]
    columns = (
        "model",
        "scheme",
        "target",
        "trials",
        "total",
        "spent on",
        "decode step",
        "prefill chunk",
        "pays back after",
    )
    note = (
        "Step times are estimates: the kernels' times added up, first and last point of the run. "
        "*Pays back after* is the tuning time over the time saved per token, where the end-to-end test is faster."
    )
    return Table("tuning_cost", "What tuning cost", columns, lines, note)


def _cost_line(tune: TuneResult, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    total = tune.cost_s.get("total")
    parts = [f"{name} {words.seconds(cost)}" for name, cost in tune.cost_s.items() if name != "total"]
    return (
        short_name(tune.model),
        tune.scheme + (f", batch {tune.batch}" if tune.batch > 1 else ""),
        tune.target,
        f"{tune.trials} trials ({tune.valid_trials} valid{_pace(tune)})",
        words.seconds(total),
        ", ".join(parts) or words.MISSING,
        _course(tune, "decode_ns"),
        _course(tune, "prefill_ns"),
        _payback(tune, rows, total),
    )


def _pace(tune: TuneResult) -> str:
    total = tune.cost_s.get("total")
    return f", {digits(tune.valid_trials / total)} a second" if total else ""


def _course(tune: TuneResult, name: str) -> str:
    points = [point[name] for point in tune.curve if point.get(name)]
    if not points:
        return words.MISSING
    return f"{words.seconds(points[0] / 1e9)} to {words.seconds(points[-1] / 1e9)}"


def _payback(tune: TuneResult, rows: list[dict[str, Any]], total: float | None) -> str:
    same = ("model", "scheme", "target", "device", "batch", "n_threads")
    for row in rows:
        faster = row["effect"] == "faster" and row["phase"] == "decode"
        if total and faster and all(row[name] == getattr(tune, name) for name in same):
            saved = 1 / row["reference_tokens_per_s"] - 1 / row["tokens_per_s"]
            return f"{words.count(total / saved, 'tokens')} of {row['test_label']}" if saved > 0 else words.MISSING
    return words.MISSING


def kernels(tunes: Sequence[TuneResult]) -> Table:
    """The decision on every kernel of every tuning run, the heaviest first."""
    lines = [
        _kernel_line(tune, kernel)
        for tune in tunes
        for kernel in sorted(tune.kernels, key=lambda kernel: (kernel.phase, -kernel.share))
    ]
    columns = ("model", "scheme", "phase", "kernel", "share of phase time", "decision", "over default", "reason")
    note = "Fresh samples, taken after the search chose its winner. *Over default* with its 95 % interval."
    return Table("kernels", "Kernel decisions", columns, lines, note)


def _kernel_line(tune: TuneResult, kernel: Kernel) -> tuple[str, ...]:
    decided = stats.kernel_decision(kernel)
    interval = decided.interval
    name = f"{kernel.task}, {kernel.chunk} {'token' if kernel.chunk == 1 else 'tokens'}, {kernel.calls} calls"
    gain = words.ratio(interval.ratio, interval.low, interval.high)
    who = (short_name(tune.model), tune.scheme, kernel.phase, name)
    return (*who, words.percent(kernel.share), decided.decision, gain, decided.reason)


def coverage(latest: Sequence[Result]) -> Table:
    """How much of each tuned case's time runs under tuned kernels, and why the rest does not."""
    lines = [
        (short_name(row.model), row.scheme, row.test, words.percent(row.coverage), _misses(row))
        for row in latest
        if row.status == "ok" and row.coverage is not None and row.schedule != "default"
    ]
    columns = ("model", "scheme", "test", "time under tuned kernels", "largest misses")
    return Table("coverage", "Coverage", columns, lines, "Shares of the phase's time.")


def _misses(row: Result) -> str:
    phases = {"both": ("prefill", "decode")}.get(metrics.phase(row), (metrics.phase(row),))
    missed = [kernel for kernel in row.kernels if kernel.phase in phases and kernel.schedule == "default"]
    missed.sort(key=lambda kernel: -kernel.share)
    named = [f"{kernel.task} {words.percent(kernel.share)}: {kernel.reason}" for kernel in missed[:MISSES]]
    rest = missed[MISSES:]
    more = [f"{len(rest)} more, {words.percent(sum(kernel.share for kernel in rest))}"] if rest else []
    return "; ".join(named + more) or "none"


def left_out(rows: list[dict[str, Any]]) -> Table:
    """The cases that have no figure, and why."""
    lines = [
        (*_who(row), row["test_label"], row["arm"], row["target"], row["status"].replace("_", " "), row["reason"])
        for row in rows
        if row["status"] != "ok"
    ]
    columns = ("model", "scheme", "test", "arm", "target", "status", "reason")
    return Table("left_out", "Failed and not run", columns, lines)


def _who(row: dict[str, Any]) -> tuple[str, str]:
    place = f" ({row['place']})" if row["place"] else ""
    return f"{row['model_label']}{place}", row["scheme"]


def _line_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "scheme", "test", "batch", "n_threads", "target", "device"))
