"""Quality beside speed: what each scheme costs and gives, a line per model and scheme."""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from tunebench.report import words
from tunebench.report.compare import PEER
from tunebench.report.labels import short_name
from tunebench.report.table import Table
from tunebench.results import Quality, Result

Line = dict[str, Any]
Newest = Sequence[tuple[Result, Line]]
Speeds = dict[str, Line]  # the line of the fastest test by phase
NOTE = (
    "The fastest test of each kind, batch 1. *Perplexity*, and *KL*, the mean divergence in nats a token from what the "
    f"float32 model predicts, with their {words.INTERVAL}; *same top* is the share of tokens whose most likely one is "
    "that model's. *Decode* is the perplexity of the end of the text a token at a time, in brackets in prompt chunks."
)
COLUMNS = ("model", "scheme", "weights", "decode speed", "prompt speed")
QUALITY = ("perplexity", "float32", "KL", "same top", "decode")


def judged(rows: Sequence[Result]) -> list[Result]:
    """The rows beside which nothing was timed."""
    return [row for row in rows if row.quality and not row.samples_ns and row.status == "ok"]


def shared(rows: Sequence[Result]) -> list[Result]:
    """The other rows, each with the newest quality of its model in its scheme where it has none of its own."""
    alone = {id(row) for row in judged(rows)}
    newest = {_key(row): row for row in sorted(rows, key=lambda row: row.test_time) if row.quality}
    others = [row for row in rows if id(row) not in alone]
    return [
        replace(row, quality=newest[_key(row)].quality, weights="real") if _lacks(row, newest) else row
        for row in others
    ]


def _lacks(row: Result, newest: dict[tuple[str, ...], Result]) -> bool:
    return row.quality is None and row.weights != "random" and _key(row) in newest


def _key(row: Result) -> tuple[str, ...]:
    return (short_name(row.model), row.model_id, row.scheme)


def table(newest: Newest, alone: Iterable[Result]) -> Table:
    """What every scheme is like, where rows say what weights they had; those in `alone` have a quality only."""
    speeds: dict[tuple[str, str], Speeds] = {}
    known: dict[tuple[str, str], Result] = {}
    for row, line in newest:
        if row.status == "ok" and row.weights and row.schedule != PEER and row.batch == 1:
            known[words.who(line)] = row
            _keep_faster(speeds.setdefault(words.who(line), {}), line)
    timed = set(map(_key, known.values()))
    for row in sorted(alone, key=lambda row: row.test_time):
        if _key(row) not in timed:
            known[short_name(row.model), row.scheme] = row
    lines = [(*who, *_cost(known[who], speeds.get(who, {})), *_cells(known[who])) for who in sorted(known)]
    return Table("schemes", "Which scheme", (*COLUMNS, *QUALITY), lines, NOTE)


def _keep_faster(found: Speeds, line: Line) -> None:
    best = found.setdefault(line["phase"], line)
    if (line["tokens_per_s"] or 0.0) > (best["tokens_per_s"] or 0.0):
        found[line["phase"]] = line


def _cost(row: Result, speeds: Speeds) -> tuple[str, ...]:
    return (words.size(row.model_size), *(_speed(speeds.get(phase)) for phase in ("decode", "prefill")))


def _speed(line: Line | None) -> str:
    return f"{words.rate(line['tokens_per_s'])} ({line['test_label']}, {line['arm']})" if line else words.MISSING


def _cells(row: Result) -> tuple[str, ...]:
    if row.quality:
        return cells(row.quality)
    said = "random weights" if row.weights == "random" else "not measured"
    return (said, *[words.MISSING] * (len(QUALITY) - 1))


def cells(quality: Quality) -> tuple[str, ...]:
    """Under the headings `QUALITY`."""
    return (
        words.between(quality.perplexity, quality.perplexity_interval),
        words.figure(quality.reference_perplexity),
        words.between(quality.kl, quality.kl_interval),
        words.percent(quality.same_top),
        f"{words.figure(quality.decode_perplexity)} ({words.figure(quality.decode_prefill_perplexity)})",
    )
