"""How files hold values as JSON, and what is read of a file that may come from anywhere."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

MOST_DEPTH = 8
MOST_LETTERS = 1 << 16
MOST_NUMBER = 2**63


def encode(value: object) -> bytes:
    """A value as JSON, which msgspec reads back as the same type.

    Strings of TVM's and numbers of NumPy's that are also Python's are written as those; a TypeError for anything else.
    """
    return msgspec.json.encode(value, enc_hook=_plain)


def read_bytes(path: Path, most_bytes: int, links: bool = True) -> bytes:
    """A whole file; an OSError where it is none that can be read, a ValueError where it is larger.

    Without `links` a symbolic link is an OSError, too, as it may lead out of its folder.
    """
    if path.is_symlink() and not links:
        raise OSError("it is a link")
    if path.exists() and not path.is_file():
        raise OSError("it is no file")  # a pipe or a device would be waited for
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return data


def decode(data: bytes) -> Any:
    """Any JSON, in UTF-8; a ValueError where it is none, or says something twice, or is nested too deeply."""
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_distinct, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check(value: object, depth: int = MOST_DEPTH) -> None:
    """Raise a ValueError for a value out of JSON that is nested deeper, longer or larger than anybody writes."""
    if depth < 0:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for each in value:
            check(each, depth - 1)
    elif isinstance(value, str) and len(value) > MOST_LETTERS:
        raise ValueError(f"a text has more than {MOST_LETTERS:,} letters")
    elif isinstance(value, int | float) and not abs(value) <= MOST_NUMBER:
        raise ValueError("a number is not between -2^63 and 2^63")


def _whole(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:40]!r} stands twice in an object")
        found[name] = value
    return found


def _plain(value: object) -> str | int | float:
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{value!r} has no form in JSON")
