"""One model on every target that ran it in the same run."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tunebench.report.charts import (
    LANE,
    Bar,
    Chart,
    arm_colours,
    digits,
    draw_lanes,
    heading,
    lane_positions,
    panels,
    records,
)
from tunebench.results import TuneResult
from tunebench.spec import EngineName

TITLE = "One model on every target, same run"
LOG_SPAN = 10.0


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per model, scheme and test: tokens/s on each target under each schedule."""
    rows = [row for row in records(frame) if row.get("first_target") and row.get("tokens_per_s")]
    rows = [row for row in rows if row["schedule"] != "library"]
    names = ("phase", "n_prompt", "n_gen", "n_depth", "batch", "model_label", "scheme")
    rows.sort(key=lambda row: (row["phase"] != "prefill", *(row[name] for name in names)))
    found: dict[str, list[Bar]] = {}
    for row in rows:
        title = f"{row['model_label']} {row['scheme']}, {row['test_label']}"
        found.setdefault(title, []).append(_bar(row))
    if not found:
        return None
    colours = arm_colours(bar.arm for bars in found.values() for bar in bars)
    figure, axes = panels(list(found), [lane_positions(bars)[2] * LANE for bars in found.values()])
    for axis, bars in zip(axes, found.values(), strict=True):
        values = [bar.value for bar in bars]
        draw_lanes(axis, bars, bars, colours, log=max(values) / min(values) > LOG_SPAN)
    axes[-1].set_xlabel("tokens/s; whisker: middle half of the samples; in brackets: of the reference")
    heading(figure, TITLE, colours.items())
    return figure


def _bar(row: dict[str, Any]) -> Bar:
    value, spread = row["tokens_per_s"], row["tokens_per_s_spread"] or 0.0
    across = row["across"]
    first = row["target"] == row["first_target"]
    words = "reference" if first else f"{across:.2f}x" if across is not None else ""
    label = f"{digits(value)}  ({words})" if words else digits(value)
    where = f"{row['target']}, {row['engine']}" if row["engine"] == EngineName.BROWSER else row["target"]
    return Bar(f"{where}\n{row['device'][:32]}", row["schedule"], value, value - spread, value + spread, label)


CHARTS = (Chart("targets", TITLE, draw),)
