"""Memory by scheme: weights and KV cache stacked, the peak as a mark."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench.report.charts import INK, LANE, Chart, beside, digits, group_label, heading, panels, records
from tunebench.results import TuneResult

TITLE = "Memory by scheme, largest over tests and schedules"
PARTS = {"weights_bytes": ("weights", "#0072b2"), "kv_cache_bytes": ("KV cache", "#e69f00")}
GB = 1e9


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A bar per model, scheme and engine, in GB."""
    groups = _groups(frame)
    if not groups:
        return None
    several_lines = any("\n" in label for label in groups)
    figure, (axes,) = panels([""], [LANE * (1.9 if several_lines else 1.5) * (len(groups) + 0.5)])
    for height, counts in enumerate(groups.values()):
        _bar(axes, height, counts)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, max(map(_extent, groups.values())) * 1.7 or 1)
    axes.set_xlabel("GB (1000³ bytes)")
    heading(figure, TITLE, [*PARTS.values(), ("peak", INK)])
    return figure


def _groups(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The largest of each counter, in GB, by label."""
    rows = [row for row in records(frame) if any(row.get(name) is not None for name in (*PARTS, "peak_bytes"))]
    several = len({row["model_label"] for row in rows}) > 1
    groups: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: (row["model_label"], row["scheme"], row["batch"], row["engine"])):
        batch = [f"batch {row['batch']}"] if row["batch"] > 1 else []
        label = group_label(row, several, *batch, *([] if row["schedule"] != "library" else [row["engine"]]))
        _raise(groups.setdefault(label, {}), row)
    return groups


def _raise(counts: dict[str, float], row: dict[str, Any]) -> None:
    for name in (*PARTS, "peak_bytes"):
        if row.get(name) is not None:
            counts[name] = max(counts.get(name, 0.0), row[name] / GB)


def _extent(counts: dict[str, float]) -> float:
    return max(sum(counts.get(name, 0.0) for name in PARTS), counts.get("peak_bytes", 0.0))


def _bar(axes: Axes, height: int, counts: dict[str, float]) -> None:
    left = 0.0
    for name, (_, colour) in PARTS.items():
        axes.barh(height, counts.get(name, 0.0), left=left, height=0.6, color=colour)
        left += counts.get(name, 0.0)
    if "peak_bytes" in counts:
        axes.plot([counts["peak_bytes"]] * 2, (height - 0.38, height + 0.38), color=INK, linewidth=2)
    labels = {**{name: label for name, (label, _) in PARTS.items()}, "peak_bytes": "peak"}
    words = " · ".join(f"{label} {digits(counts[name])}" for name, label in labels.items() if name in counts)
    uncounted = "" if "peak_bytes" in counts else ", peak not counted"
    beside(axes, _extent(counts), height, f"{words} GB{uncounted}")


CHARTS = (Chart("memory", TITLE, draw),)
