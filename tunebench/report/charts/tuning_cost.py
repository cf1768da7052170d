"""What tuning cost: the estimated time of a step, best so far, against wall-clock and trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench.report.charts import GRID, PEERS, TUNED, Chart, digits, heading, log_ticks, panels, run_label
from tunebench.results import TuneResult

TITLE = "What tuning cost: estimated time of a step, best so far"
PHASES = {"decode_ns": "Decode step", "prefill_ns": "Prefill chunk"}
AXES = {"wall_s": ("wall-clock, minutes", 60.0), "trials": ("trials", 1.0)}
COLOURS = (TUNED, *PEERS)
MARKERS = "os^Dv"  # a new one each time that the colours have run out
GAP = 0.16  # inches between two labels


@dataclass(frozen=True)
class Line:
    """The course of one tuning run in one panel."""

    x: list[float]
    y: list[float]
    colour: str
    marker: str


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A row of panels per phase, a column per kind of cost, a line per tuning run."""
    runs = [row for row in tune_rows if any(_has(row, phase) for phase in PHASES)]
    phases = [phase for phase in PHASES if any(_has(row, phase) for row in runs)]
    if not runs:
        return None
    height = max(1.9, 1.3 * GAP * len(runs))
    figure, axes = panels([f"{PHASES[phase]}, ms" for phase in phases for _ in AXES], [height] * len(phases), len(AXES))
    cells = [(phase, cost) for phase in phases for cost in AXES]
    for axis, (phase, cost) in zip(axes, cells, strict=True):
        lines = [_line(row, index, phase, cost) for index, row in enumerate(runs) if _has(row, phase)]
        _panel(axis, lines, GAP / height)
        axis.set_xlabel(AXES[cost][0])
    entries = [(run_label(row, runs), COLOURS[index % len(COLOURS)]) for index, row in enumerate(runs)]
    heading(figure, TITLE, entries, "".join(_marker(index) for index in range(len(runs))))
    return figure


def _line(row: TuneResult, index: int, phase: str, cost: str) -> Line:
    points = [point for point in row.curve if point.get(phase)]
    x = [point.get(cost, 0.0) / AXES[cost][1] for point in points]
    return Line(x, [point[phase] / 1e6 for point in points], COLOURS[index % len(COLOURS)], _marker(index))


def _panel(axes: Axes, lines: list[Line], gap: float) -> None:
    for line in lines:
        axes.plot(line.x, line.y, drawstyle="steps-post", color=line.colour, linewidth=1.8)
        axes.plot(line.x[-1], line.y[-1], line.marker, color=line.colour, markersize=5)
    axes.grid(axis="y", color=GRID, alpha=0.35, linewidth=0.6)
    axes.set_xlim(0, max(line.x[-1] for line in lines) * 1.5 or 1)
    _scale(axes, [value for line in lines for value in line.y])
    _end_labels(axes, lines, gap)


def _scale(axes: Axes, values: list[float]) -> None:
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.6, high * 1.6)
        log_ticks(axes.yaxis)
    else:
        axes.set_ylim(0, high * 1.08 or 1)


def _end_labels(axes: Axes, lines: list[Line], gap: float) -> None:
    """A mark and words for the end of each line, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = -1.0
    for line in sorted(lines, key=lambda line: line.y[-1]):
        across, up = to_axes.transform((line.x[-1], line.y[-1]))
        placed = max(up, placed + gap)
        frame: Any = {"transform": axes.transAxes, "color": line.colour, "clip_on": False}
        axes.plot((across, across + 0.04), (up, placed), linewidth=0.8, **frame)
        axes.plot(across + 0.04, placed, line.marker, markersize=4, **frame)
        change = f"{100 * (line.y[-1] / line.y[0] - 1):+.0f} %"
        axes.text(
            across + 0.055,
            placed,
            f"{digits(line.y[-1])} ms ({change})",
            va="center",
            fontsize=8,
            transform=axes.transAxes,
        )


def _has(row: TuneResult, phase: str) -> bool:
    return sum(1 for point in row.curve if point.get(phase)) > 1


def _marker(index: int) -> str:
    return MARKERS[index // len(COLOURS) % len(MARKERS)]


CHARTS = (Chart("tuning_cost", TITLE, draw),)
