"""Charts: one module each, with a tuple `CHARTS`. Here is what they share: palette, type, lanes of bars."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from tunebench import registry
from tunebench.report.labels import short_name
from tunebench.results import TuneResult

INK = "#1c2127"  # the report turns this one into the colour of the page's text
MUTED = "#737b85"
GRID = "#a0a8b2"
DEFAULT, TUNED, SLOWER = "#8b949e", "#0072b2", "#d55e00"  # Okabe and Ito: told apart by colour-blind readers too
PEERS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WIDTH = 9.0  # inches
LANE = 0.25  # inches a bar takes
LEGEND_WIDTH = 110  # letters in a line of the legend
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # laid out with the first; the second is as wide
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text: small, sharp, and can be searched and copied
    "svg.hashsalt": "tunebench",
    "text.parse_math": False,  # a name may hold a $
}

Colours = dict[str, str]  # by arm
Draw = Callable[[pd.DataFrame, Sequence[TuneResult]], Figure | None]


@dataclass(frozen=True)
class Chart:
    """A figure of the report; `draw` gives None where the rows have nothing for it."""

    name: str
    title: str
    draw: Draw


@dataclass(frozen=True)
class Bar:
    """One value of a group, in the lane of its arm, with its whisker and the words beside it."""

    group: str
    arm: str
    value: float
    low: float
    high: float
    label: str


def load() -> dict[str, Chart]:
    """Every chart, by name."""
    return registry.load(__name__, "CHARTS", Chart)


def render(chart: Chart, frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """Draw with the type and palette of this package."""
    with matplotlib.rc_context(STYLE):
        return chart.draw(frame, tune_rows)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a frame as dictionaries, with None for every missing value."""
    lines = frame.to_dict("records")
    return [{str(name): None if _missing(value) else value for name, value in line.items()} for line in lines]


def panels(titles: Sequence[str], heights: Sequence[float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with one titled panel each; `heights` in inches, one per row of panels."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.75 * len(heights) + 0.6), layout=spaced())
    grid = figure.add_gridspec(len(heights), columns, height_ratios=[max(height, 0.1) for height in heights])
    axes = [figure.add_subplot(grid[index // columns, index % columns]) for index in range(len(titles))]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, pad=8)
        quiet(axis)
    return figure, axes


def spaced() -> ConstrainedLayoutEngine:
    """The layout of every figure: nothing overlaps, panels stand a little apart."""
    return ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)


def digits(value: float) -> str:
    """Three significant digits, no exponent, thousands left whole."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    places = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 0.1 else 3
    return f"{value:.{places}f}"


def quiet(axes: Axes) -> None:
    """Leave only a light grid on the axis of the values."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color=GRID, alpha=0.35, linewidth=0.6)
    axes.tick_params(length=0)


def heading(figure: Figure, title: str, entries: Iterable[tuple[str, str]] = (), markers: str = "") -> None:
    """The figure's title, and under it its legend: (label, colour) each, a dot unless `markers` says otherwise."""
    pairs = list(entries)
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6)
        for (_, colour), marker in zip(pairs, markers or "o" * len(pairs), strict=True)
    ]
    longest = max((len(label) for label, _ in pairs), default=1)
    legend = figure.legend(
        marks,
        [label for label, _ in pairs],
        loc="outside upper left",
        ncols=max(1, min(len(pairs), LEGEND_WIDTH // (longest + 5))),
        title=title,
        alignment="left",
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    legend.get_title().set(fontsize=12, fontweight="bold", color=INK)


def arm_colours(arms: Iterable[str]) -> Colours:
    """A colour for each arm, `default` and `tuned` first and always the same."""
    fixed = {"default": DEFAULT, "tuned": TUNED}
    found = set(arms)
    peers = sorted(found - set(fixed))
    colours = {arm: colour for arm, colour in fixed.items() if arm in found}
    return colours | {arm: PEERS[index % len(PEERS)] for index, arm in enumerate(peers)}


def run_label(row: TuneResult, shown: Sequence[TuneResult]) -> str:
    """A tuning run in words: its model, scheme, batch, and its target where those shown have several."""
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    target = f", {row.target}" if len({each.target for each in shown}) > 1 else ""
    return f"{short_name(row.model)} {row.scheme}{batch}{target}"


def group_label(record: dict[str, Any], several_models: bool, *more: str) -> str:
    """The words at the left of a group: the model if there are several, the scheme, the place if it varies."""
    words = [record["scheme"], *more, *([record["place"]] if record["place"] else [])]
    line = " · ".join(words)
    return f"{record['model_label']}\n{line}" if several_models else line


def lane_positions(bars: Sequence[Bar]) -> tuple[dict[tuple[str, str], float], dict[str, float], float]:
    """The height of each bar and of each group's label, and of all of them together, in lanes."""
    order = arm_colours(bar.arm for bar in bars)
    lanes: dict[tuple[str, str], float] = {}
    centres: dict[str, float] = {}
    top = 0.0
    for group in dict.fromkeys(bar.group for bar in bars):
        arms = [arm for arm in order if any((bar.group, bar.arm) == (group, arm) for bar in bars)]
        tall = max(len(arms), 1.0 + 0.5 * group.count("\n"))
        offset = top + (tall - len(arms)) / 2
        lanes |= {(group, arm): offset + index for index, arm in enumerate(arms)}
        centres[group] = top + (tall - 1) / 2
        top += tall + 0.6
    return lanes, centres, top


def draw_lanes(
    axes: Axes, bars: Sequence[Bar], every: Sequence[Bar], colours: Colours, log: bool = False, names: bool = True
) -> None:
    """Horizontal bars (dots on a log scale) in the lanes that `every` bar beside them defines."""
    lanes, centres, top = lane_positions(every)
    for bar in bars:
        height, colour = lanes[bar.group, bar.arm], colours[bar.arm]
        if log:
            axes.axhline(height, color=GRID, alpha=0.35, linewidth=0.6)
            axes.plot(bar.value, height, "o", color=colour, markersize=6)
        else:
            axes.barh(height, bar.value, height=0.78, color=colour)
        if bar.high > bar.low:
            axes.plot((bar.low, bar.high), (height, height), color=INK, linewidth=1.1)
        beside(axes, max(bar.value, bar.high), height, bar.label)
    axes.set_yticks(list(centres.values()), list(centres) if names else [""] * len(centres))
    axes.set_ylim(top - 0.9, -0.7)
    widen(axes, bars, log)


def widen(axes: Axes, bars: Sequence[Bar], log: bool) -> None:
    """Leave room for the words to the right of the longest bar."""
    low, high = min(bar.low for bar in bars), max(max(bar.value, bar.high) for bar in bars)
    if log:
        room = max(high / low, 4.0)
        axes.set_xscale("log")
        axes.set_xlim(low / room**0.08, high * room**0.3)
        log_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, high * 1.35 or 1)


def log_ticks(axis: Axis, unit: str = "") -> None:
    """Few, round and labelled ticks: 1, 2, 5, 10 ..."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axis.set_minor_locator(NullLocator())


def beside(axes: Axes, x: float, y: float, words: str, colour: str = INK) -> None:
    """Words to the right of a point."""
    axes.annotate(words, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=colour)


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and not isfinite(value))
