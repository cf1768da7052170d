"""How a run ends early: Ctrl-C, SIGTERM and SIGHUP raise `Stopped` where the main thread is, save where it is held."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Stopped(BaseException):
    """A signal asks the run to end. `kept` says what is kept and how to go on."""

    kept = ""

    @property
    def number(self) -> int:
        """Of the signal."""
        return int(self.args[0])

    @property
    def exit_code(self) -> int:
        """As shells count: 128 and the signal's number."""
        return 128 + self.number


class _State:
    """What signals have come."""

    held = 0  # blocks that must not be left halfway
    waiting = 0  # the signal that came within them; 0: none
    raised = 0  # the signal that `Stopped` was raised for, until it is caught


_state = _State()


@contextmanager
def signals() -> Iterator[None]:
    """Within, the signals raise `Stopped`; one that is ignored, as nohup has it, still is."""
    found = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in found}
    taken = [each for each in found if before[each] is not signal.SIG_IGN]
    _state.waiting = _state.raised = 0
    for each in taken:
        signal.signal(each, _stop)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, before[each])


def _stop(number: int, frame: FrameType | None = None) -> None:
    if _state.held:
        _state.waiting = number
    else:
        _state.raised = number
        raise Stopped(number)


def asked_by(error: BaseException) -> BaseException | None:
    """The `Stopped` or KeyboardInterrupt behind an error, None where it is none; only another signal raises it again.

    TVM makes an error of its own of `Stopped` where that is raised in Python that it calls.
    """
    number, _state.raised = _state.raised, 0
    if isinstance(error, KeyboardInterrupt | Stopped):
        return error
    return Stopped(number) if number else None


@contextmanager
def keeping(words: str) -> Iterator[None]:
    """Have `Stopped` say what is kept, and how to go on, where it ends the block."""
    try:
        yield
    except BaseException as error:
        stop = asked_by(error)
        if not isinstance(stop, Stopped):
            raise
        stop.kept = stop.kept or words
        raise stop from None


def check() -> None:
    """Raise `Stopped` again where code that called this, as TVM's does, swallowed it."""
    if _state.raised:
        raise Stopped(_state.raised)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait until the end of the block, which is not left halfway; for the main thread's blocks alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
        if _state.waiting and not _state.held:
            number, _state.waiting = _state.waiting, 0
            _stop(number)
