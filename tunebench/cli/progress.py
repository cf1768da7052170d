"""What a tuning run looks like while it goes on."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunebench import stats
from tunebench.report import words
from tunebench.tuning.search import TaskSearch
from tunebench.tuning.tuner import Progress

ROWS = 16
LINE_EVERY_S = 15.0
COLUMNS = ("task", "tokens", "share", "trials", "default", "best", "gain", "state")
BESIDE_NAME = 61  # letters of all columns but the task's, and what is between them
COLOURS = {"promoted": "green", "inconclusive": "yellow", "not searched": "dim", "nothing to decide": "dim"}


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
            with contextlib.suppress(OSError):  # the terminal is gone
                self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._live:
            self._live.update(self.frame(progress))
        elif time.monotonic() - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            self._console.print(self._headline(progress))

    def frame(self, progress: Progress) -> Group:
        """What the terminal shows of a run's progress."""
        return Group(self._headline(progress), _table(progress, max(12, self._console.width - BESIDE_NAME)))

    def _headline(self, progress: Progress) -> Text:
        left = max(0.0, progress.limit_s - progress.elapsed_s)
        parts = [
            f"{self._title}: {_STAGES[progress.stage]}",
            f"{progress.trials} trials, {progress.valid} valid",
            f"{_clock(progress.elapsed_s)} gone, {_clock(left)} left at most",
        ]
        if progress.curve:
            now, first = progress.curve[-1], progress.curve[0]
            for phase in ("decode", "prefill"):
                if first[f"{phase}_ns"]:
                    parts.append(f"{phase} kernels {first[f'{phase}_ns'] / max(now[f'{phase}_ns'], 1):.1f}x")
        doing = next((search for search in progress.searches if search.doing), None)
        if doing:
            parts.append(f"now {doing.task.name}")
        return Text(" | ".join(parts), style="bold")


_STAGES = {
    "default": "timing default schedules",
    "hints": "trying what won elsewhere",
    "search": "searching",
    "decision": "measuring winners again",
}


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _table(progress: Progress, name_width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("task", "tokens", "state") else "right", no_wrap=True)
    searches = sorted(progress.searches, key=lambda s: -progress.share.get(s.task.key, 0.0))
    for search in searches[:ROWS]:
        table.add_row(*_row(progress, search, name_width), style="bold" if search.doing else "")
    if len(searches) > ROWS:
        rest = sum(progress.share.get(s.task.key, 0.0) for s in searches[ROWS:])
        table.add_row(f"{len(searches) - ROWS} more", "", f"{rest:.1%}")
    return table


def _row(progress: Progress, search: TaskSearch, name_width: int) -> list[str | Text]:
    default = stats.median(search.entry.default_ns) if search.entry.default_ns else 0.0
    decision = search.entry.decision
    state = search.doing or decision or ("exhausted" if search.entry.exhausted else "")
    name = search.task.name
    return [
        name if len(name) <= name_width else "…" + name[1 - name_width :],  # names differ at their end
        ", ".join(map(str, search.task.calls)),
        f"{progress.share.get(search.task.key, 0.0):.1%}",
        str(search.trials),
        words.seconds(default / 1e9) if default else "",
        words.seconds(search.best_ns / 1e9) if search.best_ns else "",
        f"{default / search.best_ns:.1f}x" if default and search.best_ns else "",
        Text(state, "" if search.doing else COLOURS.get(decision, "")),
    ]
