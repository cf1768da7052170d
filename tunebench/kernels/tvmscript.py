"""TVMScript without its slow look at the call stack."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tvm.tirx import PrimFunc


@contextmanager
def quick_parsing() -> Iterator[None]:
    """Parse TVMScript in a `with` block without reading the source of every frame on the stack.

    The parser calls `inspect.stack()` for each function and uses the frames alone. Finding their source lines
    takes a tenth of a second each time in a process with many modules, 40 s for TVM's own tensor intrinsics.
    """
    slow = inspect.stack
    inspect.stack = _frames
    try:
        yield
    finally:
        inspect.stack = slow


def import_intrinsics() -> None:
    """TVM's own tensor intrinsics, which contexts of the search and DLight's tensor-core rule need registered."""
    with quick_parsing():
        importlib.import_module("tvm.s_tir.tensor_intrin")


def without(func: PrimFunc, *unused: int) -> PrimFunc:
    """The kernel less arguments that it does not use, by place: TVMScript has no optional ones."""
    left = [param for place, param in enumerate(func.params) if place not in unused]
    return PrimFunc(left, func.body, func.ret_type, func.attrs)


def _frames(context: int = 1) -> list[inspect.FrameInfo]:
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        found.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back  # type: ignore[assignment]
    return found
