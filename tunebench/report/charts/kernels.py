"""Kernel by kernel: how much of the phase each takes, how much tuning gained, and what was decided."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tunebench import stats
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
from tunebench.results import TuneResult
from tunebench.spec import Kernel

TITLE = "Kernels: share of the phase's time, and speed-up of tuned over default"
COLOURS = {"promoted": TUNED, "kept default": DEFAULT, "inconclusive": PEERS[0]}
MOST = 12  # kernels of a panel; the rest are counted in its title

Panel = tuple[str, list[Kernel]]


def draw(frame: pd.DataFrame, tune_rows: Sequence[TuneResult]) -> Figure | None:
    """A panel per tuning run and phase: a bar for the share, a dot and its interval for the speed-up."""
    found = [
        panel for row in tune_rows for phase in ("decode", "prefill") if (panel := _panel(row, tune_rows, phase))[1]
    ]
    if not found:
        return None
    heights = [1.15 * LANE * (len(kernels) + 0.5) for _, kernels in found]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8 * len(found) + 0.6), layout=spaced())
    grid = figure.add_gridspec(len(found), 2, height_ratios=heights, width_ratios=(1, 2.4))
    for index, (title, kernels) in enumerate(found):
        left, right = figure.add_subplot(grid[index, 0]), figure.add_subplot(grid[index, 1])
        _shares(left, title, kernels)
        _speedups(right, kernels)
    figure.axes[-2].set_xlabel("share of the phase's time")
    figure.axes[-1].set_xlabel("times as fast as default; whisker: 95 % interval")
    heading(figure, TITLE, COLOURS.items())
    return figure


def _panel(row: TuneResult, shown: Sequence[TuneResult], phase: str) -> Panel:
    kernels = sorted((kernel for kernel in row.kernels if kernel.phase == phase), key=lambda kernel: -kernel.share)
    if sum(bool(kernel.default_ns) for kernel in kernels) <= len(kernels) // 2:
        kernels = []  # of a phase that was not tuned; shares of what little is known would mislead
    rest = kernels[MOST:]
    more = f"; {len(rest)} more take {sum(kernel.share for kernel in rest) * 100:.1f} %" if rest else ""
    return f"{run_label(row, shown)}, {phase}{more}", kernels[:MOST]


def _shares(axes: Axes, title: str, kernels: list[Kernel]) -> None:
    quiet(axes)
    axes.grid(visible=False)
    axes.set_title(title, pad=8)
    axes.barh(range(len(kernels)), [100 * kernel.share for kernel in kernels], height=0.55, color=GRID)
    for height, kernel in enumerate(kernels):
        beside(axes, 100 * kernel.share, height, f"{kernel.share * 100:.1f} %")
    axes.set_yticks(range(len(kernels)), [_name(kernel) for kernel in kernels], fontsize=8)
    axes.set_ylim(len(kernels) - 0.4, -0.6)
    axes.set_xlim(0, 140 * max(kernel.share for kernel in kernels) or 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _speedups(axes: Axes, kernels: list[Kernel]) -> None:
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
        axes.annotate("not measured", (1, height), (6, 0), textcoords="offset points", va="center", fontsize=8)
        return 1.0, 1.0
    low, high = (interval.low, interval.high) if interval.known else (interval.ratio, interval.ratio)
    axes.plot((low, high), (height, height), color=colour, linewidth=2.2, solid_capstyle="round")
    axes.plot(interval.ratio, height, "o", color=colour, markersize=6.5)
    beside(axes, high, height, f"  {interval.ratio:.2f}x")
    return low, high


def _name(kernel: Kernel) -> str:
    name = kernel.task if len(kernel.task) <= 44 else f"{kernel.task[:26]}…{kernel.task[-17:]}"
    return f"{name}, chunk {kernel.chunk}" if kernel.phase == "prefill" else name


CHARTS = (Chart("kernels", TITLE, draw),)
