"""The tables of `tunebench db`: databases, kernels, two databases side by side; figures as words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tunebench.tuning import here

if TYPE_CHECKING:
    from tunebench.tuning.content import Kernel
    from tunebench.tuning.diff import Pair
    from tunebench.tuning.entry import Provenance
    from tunebench.tuning.files import Glance

MEASURED = ("default us", "tuned us", "speed-up")


def table(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    """A table whose long words are folded."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def databases(found: Iterable[Glance], replaced: set[str]) -> Table:
    """What each database holds and who uses it; those in `replaced` have another of their name before them."""
    made = Table(box=None, pad_edge=False)
    for column in ("database", "promoted", "chunks", "changed"):
        made.add_column(column, no_wrap=True)
    made.add_column("used by", overflow="fold")
    for each in found:
        made.add_row(*_database(each, each.folder.name in replaced))
    return made


def _database(each: Glance, replaced: bool) -> tuple[str, ...]:
    warnings = f"; {len(each.warnings)} warnings" if each.warnings else ""
    return (
        each.folder.name,
        f"{each.records} of {len(each.entries)}",
        ",".join(map(str, each.chunks)) or "-",
        f"{each.changed:%Y-%m-%d}",
        here.used_by(each, replaced) + warnings,
    )


def kernels(found: Iterable[Kernel]) -> Table:
    """The decision on each kernel."""
    rows = (
        (each.name, each.decision or "-", *_times(each), _source(each), each.space(), each.entry.reason)
        for each in found
    )
    return table(("kernel", "decision", *MEASURED, "source", "space", "reason"), rows)


def side_by_side(pairs: Iterable[Pair]) -> Table:
    """Every kernel of two databases."""
    columns = [f"{what} {letter}" for letter in "AB" for what in MEASURED]
    rows = ((pair.name, pair.state, *_times(pair.a), *_times(pair.b)) for pair in pairs)
    return table(("kernel", "", *columns), rows)


def schedule(kernel: Kernel) -> Iterator[Text | str]:
    """The template with its decisions, and the trace, a line an instruction."""
    yield Text(f"\n{kernel.name}, key {kernel.key}", "bold")
    if not kernel.line:
        yield "no record: it runs by default"
    if kernel.template:
        chosen = ", ".join(f"{name} {value}" for name, value in kernel.template_decisions.items())
        yield f"template {kernel.template}: {chosen or 'nothing to decide'}"
    yield from (f"  {line}" for line in kernel.trace_lines())


def made_for(made: Provenance) -> str:
    """Target, device and threads."""
    threads = f", {made.threads} threads" if made.threads else ""
    return f"{made.target}, {made.device}{threads}"


def _times(kernel: Kernel | None) -> tuple[str, str, str]:
    """Times in microseconds and the speed-up, as words."""
    from tunebench import stats
    from tunebench.report import words

    if kernel is None:
        return "", "", ""
    default, tuned = (stats.median(samples) / 1e3 for samples in (kernel.entry.default_ns, kernel.entry.tuned_ns))
    interval = kernel.interval
    speedup = words.ratio(interval.ratio, *((interval.low, interval.high) if interval.known else ()))
    default_us, tuned_us = (f"{time:.2f}" if words.known(time) else words.MISSING for time in (default, tuned))
    return default_us, tuned_us, speedup


def _source(kernel: Kernel) -> str:
    return f"{kernel.source} ({kernel.template})" if kernel.template else kernel.source
