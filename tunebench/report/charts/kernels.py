"""Kernel by kernel: how much of the phase each takes, how much tuning gained, and what was decided."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench import stats
from tunebench.report import words
from tunebench.report.charts import (
    DEFAULT,
    GRID,
    LANE,
    MUTED,
    PEERS,
    TUNED,
    WIDTH,
    Chart,
    beside,
    heading,
    log_ticks,
    quiet,
    run_label,
    spaced,
)
from tunebench.report.steps import Step, steps
from tunebench.results import TuneResult
from tunebench.spec import Decision, Kernel

TITLE = "Kernels: share of a step's time, and speed-up of tuned over default"
COLOURS: dict[Decision, str] = {
    "promoted": TUNED,
    "kept default": DEFAULT,
    "inconclusive": PEERS[0],
    "not searched": PEERS[2],
    "nothing to decide": PEERS[3],
}
MOST = 12  # kernels of a panel; the rest are counted in its title

Panel = tuple[str, Step, Sequence[Kernel]]


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per tuning run and step: a bar for the share, a dot and its interval for the speed-up."""
    found = [
        _panel(run_label(row, tune_rows), step)
        for row in tune_rows
        for step in steps(row.kernels)
        if sum(bool(kernel.default_ns) for kernel in step.kernels) > len(step.kernels) // 2  # else it was not tuned
    ]
    if not found:
        return None
    heights = [1.15 * LANE * (len(kernels) + 0.5) for _, _, kernels in found]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8 * len(found) + 0.6), layout=spaced())
    grid = figure.add_gridspec(len(found), 2, height_ratios=heights, width_ratios=(1, 2.4))
    for index, (title, step, kernels) in enumerate(found):
        left, right = figure.add_subplot(grid[index, 0]), figure.add_subplot(grid[index, 1])
        _shares(left, title, step, kernels)
        _speedups(right, kernels)
    figure.axes[-2].set_xlabel("share of the step's measured time")
    figure.axes[-1].set_xlabel(f"times as fast as default; whisker: {words.INTERVAL}")
    dots = [kernel for _, _, kernels in found for kernel in kernels if kernel.default_ns and kernel.tuned_ns]
    present = {stats.kernel_decision(kernel).decision for kernel in dots}
    heading(figure, TITLE, [(name, colour) for name, colour in COLOURS.items() if name in present])
    return figure


def _panel(label: str, step: Step) -> Panel:
    rest = step.kernels[MOST:]
    more = f"; {len(rest)} more take {words.share(sum(step.share(kernel) or 0.0 for kernel in rest))}" if rest else ""
    return f"{label}, {step.name}{more}", step, step.kernels[:MOST]


def _shares(axes: Axes, title: str, step: Step, kernels: Sequence[Kernel]) -> None:
    quiet(axes)
    axes.grid(visible=False)
    axes.set_title(title, pad=8)
    shares = [100 * (step.share(kernel) or 0.0) for kernel in kernels]
    axes.barh(range(len(kernels)), shares, height=0.55, color=GRID)
    for height, kernel in enumerate(kernels):
        beside(axes, shares[height], height, words.share(step.share(kernel)))
    axes.set_yticks(range(len(kernels)), [_name(kernel) for kernel in kernels], fontsize=8)
    axes.set_ylim(len(kernels) - 0.4, -0.6)
    axes.set_xlim(0, 1.4 * max(shares) or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _speedups(axes: Axes, kernels: Sequence[Kernel]) -> None:
    quiet(axes)
    axes.axvline(1, color=MUTED, linewidth=1)
    bounds = [bound for height, kernel in enumerate(kernels) for bound in _dot(axes, height, kernel)]
    low, high = min(1.0, *bounds), max(1.0, *bounds)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    if high / low > 4:
        axes.set_xscale("log")
        log_ticks(axes.xaxis, "x")
        axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.3)
    else:
        room = max(high - low, 0.05)
        axes.set_xlim(low - 0.06 * room, high + 0.3 * room)
    axes.set_yticks([])
    axes.set_ylim(len(kernels) - 0.4, -0.6)


def _dot(axes: Axes, height: int, kernel: Kernel) -> tuple[float, float]:
    """Draw one kernel and say how far it reaches."""
    decided = stats.kernel_decision(kernel)
    interval, colour = decided.interval, COLOURS[decided.decision]
    if interval.ratio != interval.ratio:
        axes.annotate(decided.decision, (1, height), (6, 0), textcoords="offset points", va="center", fontsize=8)
        return 1.0, 1.0
    low, high = (interval.low, interval.high) if interval.known else (interval.ratio, interval.ratio)
    axes.plot((low, high), (height, height), color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot(interval.ratio, height, "o", color=colour, markersize=6.5)
    beside(axes, high, height, f"  {interval.ratio:.2f}x")
    return low, high


def _name(kernel: Kernel) -> str:
    return kernel.task if len(kernel.task) <= 44 else f"{kernel.task[:26]}…{kernel.task[-17:]}"


CHARTS = (Chart("kernels", TITLE, draw),)
