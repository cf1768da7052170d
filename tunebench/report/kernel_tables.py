"""Tables of what tuning did: its cost, the decision on every kernel, and how much of each case it covers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunebench import stats
from tunebench.report import metrics, probes, words
from tunebench.report.charts import digits
from tunebench.report.labels import short_name
from tunebench.report.steps import Step, decisions, steps
from tunebench.report.table import Table
from tunebench.results import Result, TuneResult
from tunebench.spec import Kernel

MISSES = 4  # measured kernels named in a line of the coverage table
SAME = ("model", "scheme", "target", "device", "batch", "n_threads")


def latest_tunes(rows: Sequence[TuneResult]) -> list[TuneResult]:
    """The newest tuning run of each model, scheme, batch and device."""
    ordered = sorted(rows, key=lambda row: row.test_time)
    return list({tuple(getattr(row, name) for name in SAME): row for row in ordered}.values())


def tuning_cost(rows: Sequence[dict[str, Any]], tunes: Sequence[TuneResult], called: dict[str, str]) -> Table:
    """What each tuning run cost, and after how many tokens the latest of a case has paid for itself."""
    newest = {id(tune) for tune in latest_tunes(tunes)}
    models = [f"{short_name(tune.model)} ({probes.through(tune)})" for tune in tunes]
    who = [(called[tune.run_id], model, _scheme(tune)) for tune, model in zip(tunes, models, strict=True)]
    figures = [_cost_cells(tune, rows if id(tune) in newest else []) for tune in tunes]
    lines = [(*names, *cells) for names, cells in zip(who, figures, strict=True)]
    columns = (
        "run",
        "model",
        "scheme",
        "trials",
        "decisions",
        "time",
        "decode step",
        "prefill chunk",
        "pays back after",
    )
    note = (
        "Step times are estimates: the kernels' times added up, first and last point of the run. *Pays back after* is "
        "that run's tuning time over the time saved per token, where the end-to-end test is faster."
    )
    return Table("tuning_cost", "What tuning cost", columns, lines, note)


def _cost_cells(tune: TuneResult, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    total = tune.cost_s.get("total")
    parts = [f"{name} {words.seconds(cost)}" for name, cost in tune.cost_s.items() if name != "total"]
    return (
        f"{tune.trials} trials ({tune.valid_trials} valid{_pace(tune)})",
        decisions(tune.kernels) or words.MISSING,
        words.seconds(total) + (f": {', '.join(parts)}" if parts else ""),
        _course(tune, "decode_ns"),
        _course(tune, "prefill_ns"),
        _payback(tune, rows, total),
    )


def _scheme(tune: TuneResult) -> str:
    return tune.scheme + (f", batch {tune.batch}" if tune.batch > 1 else "")


def _who(tunes: Sequence[TuneResult], called: dict[str, str]) -> list[tuple[str, str]]:
    """Model and scheme of each run, with its target and name where another one has the same."""
    plain = [(short_name(tune.model), _scheme(tune)) for tune in tunes]
    often = Counter(plain)
    full = [
        f"{model} ({probes.through(t)}, run {called[t.run_id]})" for t, (model, _) in zip(tunes, plain, strict=True)
    ]
    return [(name if often[who] > 1 else who[0], who[1]) for name, who in zip(full, plain, strict=True)]


def _pace(tune: TuneResult) -> str:
    total = tune.cost_s.get("total")
    return f", {digits(tune.valid_trials / total)} a second" if total else ""


def _course(tune: TuneResult, name: str) -> str:
    points = [point[name] for point in tune.curve if point.get(name)]
    if not points:
        return words.MISSING
    return f"{words.seconds(points[0] / 1e9)} to {words.seconds(points[-1] / 1e9)}"


def _payback(tune: TuneResult, rows: Sequence[dict[str, Any]], total: float | None) -> str:
    for row in rows:
        faster = row["speedup_effect"] == "faster" and row["phase"] == "decode"
        if total and faster and all(row[name] == getattr(tune, name) for name in SAME):
            saved = 1 / row["reference_tokens_per_s"] - 1 / row["tokens_per_s"]
            return f"{words.count(total / saved, 'tokens')} of {row['test_label']}" if saved > 0 else words.MISSING
    return words.MISSING


def kernels(tunes: Sequence[TuneResult], called: dict[str, str]) -> Table:
    """The decision on every kernel of every tuning run, a step after the other."""
    lines = [
        (*who, *_kernel_cells(step, kernel))
        for tune, who in zip(tunes, _who(tunes, called), strict=True)
        for step in steps(tune.kernels)
        for kernel in step.kernels
    ]
    columns = ("model", "scheme", "step", "kernel", "share of step", "decision", "over default", "reason")
    note = (
        "Fresh samples, taken after the search chose its winner. Shares are of the measured time of one step, and add "
        f"up to 100 %; that of a kernel that nobody measured is *unknown*. *Over default* with its {words.INTERVAL}."
    )
    return Table("kernels", "Kernel decisions", columns, lines, note)


def _kernel_cells(step: Step, kernel: Kernel) -> tuple[str, ...]:
    decided = stats.kernel_decision(kernel)
    interval = decided.interval
    gain = words.ratio(interval.ratio, interval.low, interval.high)
    name = f"{kernel.task}, {words.whole(kernel.calls, 'call')}"
    return (step.name, name, words.share(step.share(kernel)), decided.decision, gain, decided.reason)


def coverage(newest: Sequence[tuple[Result, dict[str, Any]]]) -> Table:
    """How much of the time of each step of each tuned case runs under tuned kernels, and why the rest does not."""
    tuned = [(row, line) for row, line in newest if row.status == "ok" and row.schedule == "tuned"]
    lines = [(*words.who(line), line["test_label"], *cells) for row, line in tuned for cells in _coverages(row)]
    columns = ("model", "scheme", "test", "step", "under tuned kernels", "never measured", "largest misses")
    note = (
        "Shares of a step's measured time. What is *never measured* has no share, and the time it takes is not known."
    )
    return Table("coverage", "Coverage", columns, lines, note)


def _coverages(row: Result) -> list[tuple[str, ...]]:
    """A line for each step; for a row that keeps no kernels what it says of them all."""
    if not row.kernels:
        return [(metrics.phase(row), words.share(row.coverage), words.MISSING, words.MISSING)]
    return [(step.name, words.share(step.coverage), _unknown(step), _misses(step)) for step in steps(row.kernels)]


def _unknown(step: Step) -> str:
    named = [f"{kernel.task}: {kernel.reason}" for kernel in step.unknown]
    return f"{len(named)} of {words.whole(len(step.kernels), 'kernel')}: {'; '.join(named)}" if named else "none"


def _misses(step: Step) -> str:
    missed = [kernel for kernel in step.kernels if kernel.schedule == "default" and kernel.share]
    named = [f"{kernel.task} {words.share(step.share(kernel))}: {kernel.reason}" for kernel in missed[:MISSES]]
    rest = missed[MISSES:]
    more = [f"{len(rest)} more, {words.share(sum(step.share(kernel) or 0.0 for kernel in rest))}"] if rest else []
    return "; ".join(named + more) or "none"
