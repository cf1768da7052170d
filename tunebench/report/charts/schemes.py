"""Which scheme to pick: speed against memory, coloured by what it loses."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench.report.charts import GRID, INK, PEERS, SLOWER, TUNED, Chart, digits, heading, panels, records
from tunebench.report.compare import PEER
from tunebench.results import TuneResult

TITLE = "Which scheme: speed, memory, and what it loses"
BANDS = ((0.01, "KL below 0.01 nats", TUNED), (0.05, "below 0.05", PEERS[1]), (0.2, "below 0.2", PEERS[0]))
WORST = ("above", SLOWER)
GB = 1e9
HEIGHT = 3.2  # inches of a panel


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per model: a dot per scheme, its decode speed over the size of its weights."""
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for row in records(frame):
        if _is_shown(row):
            name = " · ".join(filter(None, (row["scheme"], row["place"])))
            best = models.setdefault(row["model_label"], {}).setdefault(name, row)
            if row["tokens_per_s"] > best["tokens_per_s"]:
                models[row["model_label"]][name] = row
    if not models:
        return None
    figure, axes = panels(list(models), [HEIGHT] * len(models))
    for axis, schemes in zip(axes, models.values(), strict=True):
        _panel(axis, schemes)
    heading(figure, TITLE, [*((words, colour) for _, words, colour in BANDS), WORST])
    return figure


def _is_shown(row: dict[str, Any]) -> bool:
    timed = row["phase"] == "decode" and row["batch"] == 1 and row["schedule"] != PEER
    return bool(timed and row["tokens_per_s"] and row["weights_bytes"]) and row["kl"] is not None


def _panel(axes: Axes, schemes: dict[str, dict[str, Any]]) -> None:
    for name, row in schemes.items():
        x, y = row["weights_bytes"] / GB, row["tokens_per_s"]
        axes.plot(x, y, "o", color=_colour(row["kl"]), markersize=8)
        words = f"{name}: KL {row['kl']:.2g}, {digits(y)} tok/s"
        axes.annotate(words, (x, y), (7, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.grid(axis="y", color=GRID, alpha=0.35, linewidth=0.6)
    axes.set_xlim(0, max(row["weights_bytes"] for row in schemes.values()) / GB * 1.5)
    axes.set_ylim(0, max(row["tokens_per_s"] for row in schemes.values()) * 1.15)
    axes.set_xlabel("weights, GB (1000³ bytes)")
    axes.set_ylabel("decode, tokens/s")


def _colour(kl: float) -> str:
    return next((colour for limit, _, colour in BANDS if kl < limit), WORST[1])


CHARTS = (Chart("schemes", TITLE, draw),)
