"""Tuned over default, end to end, for every test of every model and scheme."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench.report import words
from tunebench.report.charts import (
    DEFAULT,
    GRID,
    INK,
    LANE,
    MUTED,
    PEERS,
    SLOWER,
    TUNED,
    Chart,
    beside,
    heading,
    log_ticks,
    panels,
    records,
)
from tunebench.results import TuneResult

COLOURS = {
    "faster": TUNED,
    "slower": SLOWER,
    "no clear difference": DEFAULT,
    "too few samples": PEERS[0],
    "noise floor unknown": PEERS[1],
}
TITLE = "Speed-up of tuned over default schedules, same run"


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per model: a dot and its interval per scheme and test."""
    rows = [row for row in records(frame) if row.get("speedup_effect") in COLOURS]
    if not rows:
        return None
    rows.sort(key=lambda row: (row["model_label"], row["place"], row["phase"], row["test_label"], row["scheme"]))
    models = list(dict.fromkeys(row["model_label"] for row in rows))
    groups = [[row for row in rows if row["model_label"] == model] for model in models]
    figure, axes = panels(models, [1.3 * LANE * (len(group) + 1) for group in groups])
    limits = _limits(rows)
    for axis, group in zip(axes, groups, strict=True):
        _panel(axis, group, limits)
    axes[-1].set_xlabel(f"times as fast as default; whisker: {words.INTERVAL}; band: the run's noise floor")
    present = dict.fromkeys(row["speedup_effect"] for row in rows)
    heading(figure, TITLE, [(effect, COLOURS[effect]) for effect in COLOURS if effect in present])
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], limits: tuple[float, float, bool]) -> None:
    low, high, log = limits
    noise = max((row["noise"] or 0.0 for row in rows), default=0.0)
    axes.axvspan(1 / (1 + noise), 1 + noise, color=GRID, alpha=0.25, linewidth=0)
    axes.axvline(1, color=MUTED, linewidth=1)
    for height, row in enumerate(rows):
        _dot(axes, height, row)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if log:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, "x")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlim(low, high)


def _dot(axes: Axes, height: int, row: dict[str, Any]) -> None:
    colour, value = COLOURS[row["speedup_effect"]], row["speedup"]
    low, high = row["speedup_low"] or value, row["speedup_high"] or value
    axes.plot((low, high), (height, height), color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot(value, height, "o", color=colour, markersize=7)
    label = f"{value:.2f}x  ({low:.2f} to {high:.2f})" if row["speedup_high"] else f"{value:.2f}x  (too few samples)"
    beside(axes, max(high, value), height, "  " + label, INK)


def _label(row: dict[str, Any]) -> str:
    return " · ".join(part for part in (row["test_label"], row["scheme"], row["place"]) if part)


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float, bool]:
    """The x range of all panels, with room for the words, and whether it is logarithmic."""
    low = min(1.0, *(row["speedup_low"] or row["speedup"] for row in rows))
    high = max(1.0, *(row["speedup_high"] or row["speedup"] for row in rows))
    span = high / low
    if span > 4:
        return low / span**0.06, high * span**0.4, True
    room = max(high - low, 0.05)
    return low - 0.08 * room, high + 0.45 * room, False


CHARTS = (Chart("speedup", TITLE, draw),)
