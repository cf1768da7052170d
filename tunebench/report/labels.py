"""How models are called where several have one name: with the first digits of a hash of what each computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from msgspec.structs import replace

from tunebench.results import Result, TuneResult

Row = TypeVar("Row", Result, TuneResult)
DIGITS = 4  # of a hash that are shown


def short_name(model: str) -> str:
    """The name of a model, which may be given as the path of its JSON."""
    return Path(model).name.removesuffix(".json")


def told_apart(rows: Sequence[Row], every: Sequence[Result | TuneResult]) -> list[Row]:
    """`rows` with a hash in the name of each model that another one of `every` row shares."""
    hashes: dict[str, set[str]] = {}
    for row in every:
        hashes.setdefault(short_name(row.model), set()).add(row.model_id)
    return [replace(row, model=_name(row)) if len(hashes[short_name(row.model)]) > 1 else row for row in rows]


def _name(row: Result | TuneResult) -> str:
    return f"{short_name(row.model)} {row.model_id[:DIGITS]}".rstrip()  # of no known hash: the plain name
