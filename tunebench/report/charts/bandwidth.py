"""How near decode comes to the measured bandwidth, and prefill to the measured matrix rate."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from tunebench.report.charts import (
    LANE,
    MUTED,
    Bar,
    Chart,
    arm_colours,
    digits,
    draw_lanes,
    group_label,
    heading,
    lane_positions,
    panels,
    records,
)
from tunebench.results import TuneResult

TITLE = "Share of what the machine was measured to do"
PANELS = {
    "read_share": "Decode: share of the measured bandwidth",
    "matrix_share": "Prefill: share of the measured matrix rate",
}


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel for decode and one for prefill, with a line at 100 %."""
    found = {column: bars for column in PANELS if (bars := _bars(frame, column))}
    if not found:
        return None
    colours = arm_colours(bar.arm for bars in found.values() for bar in bars)
    heights = [lane_positions(bars)[2] * LANE for bars in found.values()]
    figure, axes = panels([PANELS[column] for column in found], heights)
    for axis, bars in zip(axes, found.values(), strict=True):
        draw_lanes(axis, bars, bars, colours)
        axis.axvline(100, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axis.set_xlim(0, max(120.0, *(bar.value * 1.2 for bar in bars)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes[-1].set_xlabel("dashed line: the best that a probe of the device reached")
    heading(figure, TITLE, colours.items())
    return figure


def _bars(frame: pd.DataFrame, column: str) -> list[Bar]:
    rows = [row for row in records(frame) if row.get(column) is not None]
    order = ("model_label", "scheme", "n_prompt", "n_gen", "n_depth", "batch")
    rows.sort(key=lambda row: tuple(row[name] for name in order))
    several = len({row["model_label"] for row in rows}) > 1
    tests = {row["test_label"] for row in rows}
    bars = []
    for row in rows:
        share = 100 * row[column]
        words = f"{share:.0f} %  ({digits(row['tokens_per_s'])} tok/s)"
        bars.append(
            Bar(
                group_label(row, several, *([row["test_label"]] if len(tests) > 1 else [])),
                row["arm"],
                share,
                share,
                share,
                words,
            )
        )
    return bars


CHARTS = (Chart("bandwidth", TITLE, draw),)
