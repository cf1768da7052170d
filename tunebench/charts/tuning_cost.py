"""What tuning cost: the estimated time of a step, best so far, against wall-clock and trials."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench.charts import GRID, PEERS, TUNED, Chart, heading, panels
from tunebench.results import TuneResult

TITLE = "What tuning cost: estimated time of a step, best so far"
PHASES = {"decode_ns": "Decode step", "prefill_ns": "Prefill piece"}
AXES = {"wall_s": ("wall-clock, minutes", 60.0), "trials": ("trials", 1.0)}
GAP = 0.075  # of the axis, between two labels


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A row of panels per phase, a column per kind of cost, a line per tuning run."""
    runs = [row for row in tune_rows if len(row.curve) > 1]
    phases = [phase for phase in PHASES if any(_has(row, phase) for row in runs)]
    if not phases:
        return None
    titles = [f"{PHASES[phase]}, ms" for phase in phases for _ in AXES]
    figure, axes = panels(titles, [max(1.9, 0.24 * len(runs))] * len(phases), len(AXES))
    cells = [(phase, cost) for phase in phases for cost in AXES]
    for axis, (phase, cost) in zip(axes, cells, strict=True):
        _panel(axis, [row for row in runs if _has(row, phase)], runs, phase, cost)
    heading(figure, TITLE, [(_name(row), _colour(runs.index(row))) for row in runs])
    return figure


def _panel(axes: Axes, rows: list[TuneResult], runs: list[TuneResult], phase: str, cost: str) -> None:
    words, unit = AXES[cost]
    ends = []
    for row in rows:
        points = [point for point in row.curve if point.get(phase)]
        x, y = [point[cost] / unit for point in points], [point[phase] / 1e6 for point in points]
        axes.plot(x, y, drawstyle="steps-post", color=_colour(runs.index(row)), linewidth=1.8)
        axes.plot(x[-1], y[-1], "o", color=_colour(runs.index(row)), markersize=5)
        ends.append((x[-1], y[-1], f"{y[-1]:.3g} ms ({y[-1] / y[0] - 1:+.0%})"))
    axes.grid(axis="y", color=GRID, alpha=0.35, linewidth=0.6)
    axes.set_xlabel(words)
    axes.set_xlim(0, max(end[0] for end in ends) * 1.42 or 1)
    _scale(axes)
    _end_labels(axes, ends)


def _scale(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, high)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")


def _end_labels(axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Words at the ends of the lines, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = -1.0
    for x, y, words in sorted(ends, key=lambda end: end[1]):
        across, up = to_axes.transform((x, y))
        placed = max(up, placed + GAP)
        axes.annotate(
            words,
            (across, up),
            (across + 0.025, placed),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
        )


def _has(row: TuneResult, phase: str) -> bool:
    return sum(1 for point in row.curve if point.get(phase)) > 1


def _name(row: TuneResult) -> str:
    return f"{Path(row.model).name.removesuffix('.json')} {row.scheme}"


def _colour(index: int) -> str:
    return (TUNED, *PEERS)[index % (1 + len(PEERS))]


CHARTS = (Chart("tuning_cost", TITLE, draw),)
