"""Where the kernels of a case come from, and what a chunk would take with one source alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunebench import stats
from tunebench.report import words
from tunebench.report.table import Table
from tunebench.results import Result
from tunebench.spec import Kernel, Schedule

ALONE: tuple[Schedule, ...] = ("default", "tuned", "library")


def table(newest: Sequence[tuple[Result, dict[str, Any]]]) -> Table:
    """A line for each chunk size of each tuned case on a GPU, or where there are kernels of a library."""
    lines: dict[tuple[object, ...], tuple[str, ...]] = {}
    tuned = [(row, line) for row, line in newest if row.schedule == "tuned"]
    library = any("library" in _times(kernel) for row, _ in tuned for kernel in row.kernels)
    names = ALONE if library else ALONE[:2]
    for row, line in tuned if library else [(row, line) for row, line in tuned if not row.n_threads]:
        for chunk in sorted({kernel.chunk for kernel in row.kernels}):
            kernels = [kernel for kernel in row.kernels if kernel.chunk == chunk]
            who = words.who(line)
            lines[who, row.batch, chunk] = (*who, *_cells(row, chunk, kernels, names))
    columns = ("model", "scheme", "chunk", "kernels", *(f"{name} alone" for name in names), "as chosen", "over default")
    note = (
        "Kernel times of one chunk, added up: with one source alone, which where it has no kernel falls back to the "
        "default, and as chosen. *Over default* is the geometric mean of the kernels' ratios, weighted by their time "
        "in the default, attention aside: its default is plain loops that nobody would ship."
    )
    return Table("sources", "Where kernels come from", columns, list(lines.values()), note)


def _cells(row: Result, chunk: int, kernels: Sequence[Kernel], names: Sequence[str]) -> tuple[str, ...]:
    used = Counter(kernel.schedule for kernel in kernels)
    named = ", ".join(f"{used[name]} {name}" for name in ALONE if used[name])
    totals = [sum(k.calls * _times(k).get(name, _times(k)["default"]) for k in kernels) for name in names]
    chosen = sum(kernel.calls * _times(kernel)[kernel.schedule] for kernel in kernels)
    tokens = f"{chunk} {'token' if chunk == 1 else 'tokens'}" + (f", batch {row.batch}" if row.batch > 1 else "")
    more = "> " if any(not kernel.share for kernel in kernels) else ""  # than what was measured of them
    spent = [more + words.seconds(total / 1e9) for total in (*totals, chosen)]
    return (tokens, named, *spent, words.ratio(over_default(kernels)))


def over_default(kernels: Sequence[Kernel]) -> float:
    """The kernels' gain over the default: geometric mean, weighted by time in the default, attention aside."""
    plain = [
        kernel for kernel in kernels if not kernel.task.startswith("attention") and _times(kernel)[kernel.schedule]
    ]
    weights = [kernel.calls * _times(kernel)["default"] for kernel in plain]
    logs = [math.log(_times(k)["default"] / _times(k)[k.schedule]) if _times(k)["default"] else 0.0 for k in plain]
    return math.exp(sum(w * log for w, log in zip(weights, logs, strict=True)) / (sum(weights) or 1.0))


def _times(kernel: Kernel) -> dict[str, float]:
    """Median nanoseconds of one call by source; the default always, 0 where it was never timed."""
    samples = {"default": kernel.default_ns, **kernel.by_source}
    if kernel.schedule != "default":
        samples[kernel.schedule] = kernel.tuned_ns
    return {name: float(stats.median(values)) if values else 0.0 for name, values in samples.items()}
