"""Tokens/s of every arm: default, tuned, and the engines they are compared with."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from tunebench.report.charts import (
    LANE,
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

TITLE = "Throughput"
LOG_SPAN = 10.0


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per test: tokens/s of every arm, by scheme."""
    tests = _bars(frame)
    if not tests:
        return None
    colours = arm_colours(bar.arm for bars in tests.values() for bar in bars)
    columns = min(len(tests), 2)
    rows = [_row(list(tests.values())[start : start + columns]) for start in range(0, len(tests), columns)]
    figure, axes = panels(list(tests), [lane_positions(row)[2] * LANE for row in rows], columns)
    for index, (axis, bars) in enumerate(zip(axes, tests.values(), strict=True)):
        values = [bar.value for bar in bars]
        log = max(values) / min(values) > LOG_SPAN
        draw_lanes(axis, bars, rows[index // columns], colours, log, names=index % columns == 0)
        axis.set_xlabel("tokens/s; whisker: middle half of the samples")
    heading(figure, _title(frame), colours.items())
    return figure


def _row(panels_bars: list[list[Bar]]) -> list[Bar]:
    """The bars of the panels that stand side by side, and so share their lanes."""
    return sorted((bar for bars in panels_bars for bar in bars), key=lambda bar: bar.group)


def _bars(frame: pd.DataFrame) -> dict[str, list[Bar]]:
    rows = [row for row in records(frame) if row.get("tokens_per_s")]
    several = len({row["model_label"] for row in rows}) > 1
    tests: dict[str, list[Bar]] = {}
    runs: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        runs.setdefault((row["test_label"], group_label(row, several)), set()).add(row["run"])
    order = ("n_prompt", "n_gen", "n_depth", "batch")
    for row in sorted(rows, key=lambda row: (row["phase"] != "prefill", *(row[name] for name in order))):
        value, spread = row["tokens_per_s"], row["tokens_per_s_spread"] or 0.0
        group = group_label(row, several)
        label = digits(value) + (f"  (run {row['run']})" if len(runs[row["test_label"], group]) > 1 else "")
        bar = Bar(group, row["arm"], value, value - spread, value + spread, label)
        tests.setdefault(row["test_label"], []).append(bar)
    return tests


def _title(frame: pd.DataFrame) -> str:
    models = list(dict.fromkeys(frame["model_label"]))
    return f"{TITLE}, {models[0]}" if len(models) == 1 else TITLE


CHARTS = (Chart("throughput", TITLE, draw),)
