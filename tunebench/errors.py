"""The one exception a user is meant to read."""

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

Value = TypeVar("Value")


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


def one_line(text: str) -> str:
    """A text of several lines in one."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


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
