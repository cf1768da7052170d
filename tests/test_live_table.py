"""The live table of a tuning run on a narrow terminal."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tunebench.cli.progress import TuneView
from tunebench.tuning.tuner import Progress

DECISIONS = ("promoted", "kept default", "inconclusive")


def search(name: str, decision: str) -> Any:
    """A task that was searched, as far as the table looks at it."""
    task = SimpleNamespace(key=name, name=name, calls={1: 2, 16: 2, 128: 2})
    entry = SimpleNamespace(default_ns=[305_400_000], decision=decision, exhausted="")
    return SimpleNamespace(task=task, entry=entry, trials=1024, valid=1000, best_ns=1_001_000, doing="")


@pytest.mark.parametrize("decision", DECISIONS)
def test_eighty_columns_show_every_figure_whole(decision: str) -> None:
    name = "fused_q4i8f16_0_matmul10_add1"
    console = Console(width=80, file=io.StringIO())
    progress = Progress([search(name, decision)], limit_s=60.0, share={name: 1.0})
    console.print(TuneView(console, "demo").frame(progress))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    row = next(line for line in lines if line.startswith("…"))
    assert row.split()[0][1:] == name[-len(row.split()[0]) + 1 :]  # its end, which tells it from others
    assert " ".join(row.split()[1:]) == f"1, 16, 128 100.0% 1024 305 ms 1.00 ms 305.1x {decision}"
