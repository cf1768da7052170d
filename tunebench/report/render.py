"""Tables, sentences and figures -> Markdown, one self-contained HTML page, and files of charts."""

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tunebench import durable
from tunebench.errors import one_line
from tunebench.report.charts import INK, STYLE, Chart
from tunebench.report.table import Table

Drawn = list[tuple[Chart, Figure]]

AFTER = {  # the charts that stand under a table
    "summary": ("speedup", "throughput", "bandwidth"),
    "schemes": ("schemes",),
    "targets": ("targets",),
    "memory": ("memory",),
    "tuning_cost": ("tuning_cost",),
    "kernels": ("kernels",),
}
LONG = 16  # rows; a longer table is folded in the page, the summary excepted

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1c2127; --quiet: #5c6570; --page: #ffffff; --card: #f5f7f9; --line: #dde2e7; --mark: #0072b2; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e4e8ec; --quiet: #9aa4af; --page: #14181c; --card: #1d2329; --line: #313a43; --mark: #56b4e9; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ font-size: 1.7rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .5rem; }}
p {{ margin: .4rem 0; max-width: 68ch; }}
.quiet, .note {{ color: var(--quiet); font-size: .88rem; }}
.findings {{ list-style: none; margin: 1.2rem 0; padding: .9rem 1.1rem; background: var(--card);
  border-left: 4px solid var(--mark); border-radius: 4px; }}
.findings li {{ margin: .25rem 0; }}
.wide {{ overflow-x: auto; margin: .6rem 0; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; color: var(--quiet); white-space: nowrap; }}
td.short {{ white-space: nowrap; }}
td.middle {{ min-width: 8.5rem; }}
td.long {{ min-width: 12rem; }}
summary {{ cursor: pointer; color: var(--mark); margin: .4rem 0; }}
figure {{ margin: 1.6rem 0; overflow-x: auto; }}
figure svg {{ display: block; width: 100%; min-width: 40rem; height: auto; color: var(--ink); }}
.warnings li {{ margin: .2rem 0; font-size: .9rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def save_charts(drawn: Drawn, folder: Path) -> None:
    """Write each figure as `<name>.svg`; the same rows make the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for chart, figure in drawn:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
            durable.replace(folder / f"{chart.name}.svg", buffer.getvalue())


def markdown(
    title: str, findings: Sequence[str], tables: Sequence[Table], drawn: Drawn, warnings: Sequence[str]
) -> str:
    """The report as Markdown; the charts are links into `charts/`. Notes are ours, and may hold emphasis."""
    parts = [f"# {_plain(title)}", "\n".join(f"- {_item(finding)}" for finding in findings)]
    for table in tables:
        parts += [f"## {_plain(table.title)}", *([table.note] if table.note else []), _markdown_table(table)]
        parts += [f"![{chart.title}](charts/{chart.name}.svg)" for chart, _ in _under(table, drawn)]
    parts += [f"![{chart.title}](charts/{chart.name}.svg)" for chart, _ in _leftover(tables, drawn)]
    if warnings:
        parts += ["## Warnings", "\n".join(f"- {_item(warning)}" for warning in warnings)]
    return "\n\n".join(parts) + "\n"


def html(title: str, findings: Sequence[str], tables: Sequence[Table], drawn: Drawn, warnings: Sequence[str]) -> str:
    """The report as one page without any outside reference."""
    parts = [f"<h1>{escape(title)}</h1>", _list(findings, "findings")]
    for table in tables:
        parts += [f'<h2 id="{table.name}">{escape(table.title)}</h2>', _html_table(table)]
        parts += [_html_figure(chart, figure) for chart, figure in _under(table, drawn)]
    parts += [_html_figure(chart, figure) for chart, figure in _leftover(tables, drawn)]
    if warnings:
        parts += ['<h2 id="warnings">Warnings</h2>', _list(warnings, "warnings")]
    return PAGE.format(title=escape(title), body="\n".join(parts))


def _under(table: Table, drawn: Drawn) -> Drawn:
    names = AFTER.get(table.name, ())
    return sorted((pair for pair in drawn if pair[0].name in names), key=lambda pair: names.index(pair[0].name))


def _leftover(tables: Sequence[Table], drawn: Drawn) -> Drawn:
    """The charts whose table is missing, and those that no table asks for."""
    placed = {name for table in tables for name in AFTER.get(table.name, ())}
    return [pair for pair in drawn if pair[0].name not in placed]


def _markdown_table(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(words: str) -> str:
    """A text in one line that Markdown shows as it is; an underscore within a word is one already."""
    return re.sub(r"([\\`*\[\]<>|~$&])|(?<!\w)_|_(?!\w)", r"\\\g<0>", one_line(words))


def _item(words: str) -> str:
    """The text of a list's item, which begins no heading, list or rule of its own."""
    return re.sub(r"^(\d{0,9})([-+#=.):])", r"\1\\\2", _plain(words))


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>\n" for row in table.rows)
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    if len(table.rows) > LONG and table.name != "summary":
        body = f"<details><summary>{len(table.rows)} rows</summary>{body}</details>"
    return (f'<p class="note">{_emphasis(table.note)}</p>' if table.note else "") + body


def _html_cell(words: str) -> str:
    kind = "short" if len(words) <= 26 else "long" if len(words) > 40 else "middle"
    return f'<td class="{kind}">{escape(words)}</td>'


def _emphasis(note: str) -> str:
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", escape(note))


def _list(items: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _html_figure(chart: Chart, figure: Figure) -> str:
    return f'<figure role="img" aria-label="{escape(chart.title)}">{inline_svg(chart.name, figure)}</figure>'


def inline_svg(name: str, figure: Figure) -> str:
    """A figure as an SVG element: transparent, its ink that of the page, its ids its own."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(INK, "currentColor")
