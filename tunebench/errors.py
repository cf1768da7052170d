"""The one exception a user is meant to read."""

import functools
import re
from collections.abc import Callable, Hashable
from typing import TypeVar

Value = TypeVar("Value")

ESCAPES = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"
"""What terminals take for colours, moves and titles."""
DIRECTIONS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
NOT_TEXT = re.compile(
    f"{ESCAPES}|[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff{DIRECTIONS}]"
)
"""Escape sequences, control characters but newline and tab, marks that turn the direction, halves of a pair."""


class TuneBenchError(Exception):
    """What went wrong in one line, and in `hint` what to do about it."""

    exit_code = 2  # of the command

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class StorageError(TuneBenchError):
    """A file that could not be written, as the disk is full, broken or read-only; what was there before is whole."""

    exit_code = 1


def one_line(text: str, most: int = 2000) -> str:
    """A text of several lines in one, of at most so many letters, without what a terminal or a page would obey."""
    shown = " ".join(filter(None, (NOT_TEXT.sub("", line).strip() for line in text.splitlines())))
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def remembered(function: Callable[..., Value]) -> Callable[..., Value]:
    """Like `functools.cache`, and a TuneBenchError is remembered, too: the second call says the same as the first."""

    @functools.cache
    def outcome(*given: Hashable, **named: Hashable) -> Value | TuneBenchError:
        try:
            return function(*given, **named)
        except TuneBenchError as error:
            return type(error)(error.message, error.hint)

    @functools.wraps(function)
    def call(*given: Hashable, **named: Hashable) -> Value:
        found = outcome(*given, **named)
        if isinstance(found, TuneBenchError):
            raise type(found)(found.message, found.hint)
        return found

    return call


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()[:200]}" if lines else type(error).__name__
