"""What a tuning run looks like while it goes on."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunebench import stats
from tunebench.tuning.search import TaskSearch
from tunebench.tuning.tuner import Progress

ROWS = 16
LINE_EVERY_S = 15.0
COLOURS = {"promoted": "green", "inconclusive": "yellow"}


class TuneView:
    """Call it with a run's progress: a live table in a terminal, now and then a line elsewhere."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._last_line_s = float("-inf")

    def __enter__(self) -> TuneView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._live:
            self._live.update(Group(self._headline(progress), _table(progress)))
        elif time.monotonic() - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._console.print(self._headline(progress))

    def _headline(self, progress: Progress) -> Text:
        left = max(0.0, progress.limit_s - progress.elapsed_s)
        words = [
            f"{self._title}: {_STAGES[progress.stage]}",
            f"{progress.trials} trials, {progress.valid} valid",
            f"{_clock(progress.elapsed_s)} gone, {_clock(left)} left at most",
        ]
        if progress.curve:
            now, first = progress.curve[-1], progress.curve[0]
            for phase in ("decode", "prefill"):
                if first[f"{phase}_ns"]:
                    words.append(f"{phase} kernels {first[f'{phase}_ns'] / max(now[f'{phase}_ns'], 1):.1f}x")
        doing = next((search for search in progress.searches if search.doing), None)
        if doing:
            words.append(f"now {doing.task.name}")
        return Text(" | ".join(words), style="bold")


_STAGES = {"default": "timing default schedules", "search": "searching", "decision": "measuring winners again"}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _table(progress: Progress) -> Table:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("task", "left"), ("chunks", "left"), ("share", "right"), ("trials", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("default", "best", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    searches = sorted(progress.searches, key=lambda s: -progress.share.get(s.task.key, 0.0))
    for search in searches[:ROWS]:
        table.add_row(*_row(progress, search), style="bold" if search.doing else "")
    if len(searches) > ROWS:
        rest = sum(progress.share.get(s.task.key, 0.0) for s in searches[ROWS:])
        table.add_row(f"{len(searches) - ROWS} more", "", f"{rest:.1%}")
    return table


def _row(progress: Progress, search: TaskSearch) -> list[str | Text]:
    default = stats.median(search.entry.default_ns) if search.entry.default_ns else 0.0
    decision = search.entry.decision
    state = search.doing or decision or ("exhausted" if search.entry.exhausted else "")
    return [
        search.task.name,
        ", ".join("decode" if chunk == 1 else f"prefill {chunk}" for chunk in search.task.calls),
        f"{progress.share.get(search.task.key, 0.0):.1%}",
        str(search.trials),
        f"{default / 1e3:,.1f} us" if default else "",
        f"{search.best_ns / 1e3:,.1f} us" if search.best_ns else "",
        f"{default / search.best_ns:.1f}x" if default and search.best_ns else "",
        Text(state, "" if search.doing else COLOURS.get(decision, "")),
    ]
