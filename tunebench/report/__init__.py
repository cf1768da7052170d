"""Rows -> report.md, report.html, summary.csv and charts. Never needs TVM."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pandas as pd
import rich.table
from rich.text import Text

from tunebench import durable, results
from tunebench.errors import TuneBenchError, one_line
from tunebench.report import (
    charts,
    findings,
    frame,
    kernel_tables,
    labels,
    probes,
    quality,
    render,
    runs,
    sources,
    tables,
)
from tunebench.report.table import Table
from tunebench.results import Result, TuneResult

RATE = " tok/s"
LONGEST = 1000  # letters of a text
Row = TypeVar("Row", Result, TuneResult, Result | TuneResult)


@dataclass(frozen=True)
class Report:
    """What was written: the cases (a line per row, `latest` marks the newest), the tables in words, the warnings."""

    frame: pd.DataFrame
    tunes: list[TuneResult]
    findings: list[str]
    tables: list[Table]
    warnings: list[str]
    charts: list[str]
    out: Path


def write_report(paths: list[Path], out: Path) -> Report:
    """Read the rows of `paths` and write report.md, report.html, summary.csv and charts/ into `out`."""
    rows, torn = _read(paths)
    named = labels.told_apart([row for row in rows if isinstance(row, Result)], rows)
    cases, alone = quality.shared(named), quality.judged(named)
    tunes = labels.told_apart([row for row in rows if isinstance(row, TuneResult)], rows)
    tunes.sort(key=lambda row: row.test_time)
    called = runs.names(rows)
    every = frame.build(cases, called)
    newest = every[every["latest"]]
    drawn = _draw(newest, kernel_tables.latest_tunes(tunes))
    said = findings.headline(newest, tunes)
    shown = _tables(every, cases, alone, tunes, called)
    warnings = torn + findings.cautions(frame.newest(cases, every))
    report = Report(every, tunes, said, shown, warnings, [chart.name for chart, _ in drawn], out)
    _write(report, newest, drawn)
    return report


def _tables(
    every: pd.DataFrame,
    cases: Sequence[Result],
    alone: Sequence[Result],
    tunes: Sequence[TuneResult],
    called: dict[str, str],
) -> list[Table]:
    """Every table that has a row, in the order of the report."""
    newest = frame.newest(cases, every)
    summary, *of_cases, left_out = tables.build(every)
    found = [
        summary,
        quality.table(newest, alone),
        *of_cases,
        kernel_tables.tuning_cost([line for _, line in newest], tunes, called),
    ]
    found += [kernel_tables.kernels(kernel_tables.latest_tunes(tunes), called), kernel_tables.coverage(newest)]
    found += [left_out, sources.table(newest), probes.table(cases, called), runs.table([*cases, *tunes], called)]
    return [*(table for table in found if table.rows), findings.environment([row for row, _ in newest], tunes)]


def summary_table(report: Report) -> rich.table.Table:
    """The summary (or, without one, the cases that have no figure) for the terminal."""
    found = {table.name: table for table in report.tables}
    table = (
        found.get("summary")
        or found.get("engines")
        or found.get("schemes")
        or found.get("left_out")
        or report.tables[0]
    )
    shown = rich.table.Table(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        in_rate = any(RATE in row[index] for row in table.rows)
        shown.add_column(f"{column},{RATE}" if in_rate else column, overflow="fold", no_wrap=index < 2)
    for row in table.rows:
        first, *rest = row  # the first says where, in brackets
        shown.add_row(*map(Text, [first, *map(_short, rest)]))
    return shown


def _short(cell: str) -> str:
    """A cell for the terminal: without what stands in brackets, what its share is of, and the unit of the heading."""
    plain = re.sub(r" \(.*?\)", "", cell)
    return plain.partition(" of ")[0].partition(": ")[0].replace(RATE, "").removesuffix(" figure")


def _read(paths: list[Path]) -> tuple[list[Result | TuneResult], list[str]]:
    rows: list[Result | TuneResult] = []
    warnings: list[str] = []
    for path in paths:
        found, torn = results.read(path)
        rows += map(_shown, found)
        warnings += torn
    if not rows:
        names = ", ".join(map(str, paths)) or "no file"
        raise TuneBenchError(f"no result rows in {names}.", "; ".join(warnings) or "Run `tunebench bench` first.")
    return rows, warnings


def _shown(row: Row) -> Row:
    """A row whose texts are lines that any page, chart and terminal can show."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {one_line(name, LONGEST): shown(each) for name, each in value.items()}
        if isinstance(value, list):
            return list(map(shown, value))
        return one_line(value, LONGEST) if isinstance(value, str) else value

    return msgspec.convert(shown(msgspec.to_builtins(row)), type(row))


def _draw(newest: pd.DataFrame, tunes: list[TuneResult]) -> render.Drawn:
    figures = [(chart, charts.render(chart, newest, tunes)) for chart in charts.load().values()]
    return [(chart, figure) for chart, figure in figures if figure is not None]


def _write(report: Report, newest: pd.DataFrame, drawn: render.Drawn) -> None:
    content = ("TuneBench report", report.findings, report.tables, drawn, report.warnings)
    texts = {
        "report.md": render.markdown(*content),
        "report.html": render.html(*content),
        "summary.csv": newest.drop(columns="latest").map(_csv_cell).to_csv(index=False),
    }
    try:
        report.out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            durable.replace(report.out / name, text.encode())
        render.save_charts(drawn, report.out / "charts")
    except OSError as error:
        raise durable.refusal(report.out, error) from None


def _csv_cell(value: Any) -> Any:
    """What no spreadsheet takes for a formula: a text that begins like one gets a quote before it, as OWASP advises."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
