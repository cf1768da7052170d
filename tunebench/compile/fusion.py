"""Neighbours in a plan become one launch: a product of one row takes the normalisation before it and the gate after it.

A launch costs a GPU API a few microseconds, as much as these small kernels take. Only products whose schedule is a
template that can do both are fused, with the decisions that the search made for the product alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm

from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates
from tunebench.kernels.operation import Matmul, Operation, RmsNorm, SiluMul
from tunebench.kernels.templates import Decisions, Gpu, Template
from tunebench.runtime.plan import Program


@dataclass(frozen=True)
class Invoked:
    """A kernel over places of buffers, the last of which it writes."""

    kernel: str
    buffers: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Neighbours and the kernel that does their work; arguments are named by places, the last of each is written."""

    name: str
    apart: tuple[tuple[Program, tuple[int, ...]], ...]
    fused: tuple[Program, tuple[int, ...]]
    params: Mapping[int, tvm.tirx.Buffer]  # by place


Accept = Callable[[Pair], bool]
"""Whether to use a fused kernel; it is for whoever has the device to check and time it."""


@dataclass(frozen=True)
class _Known:
    """What there is to know of a kernel."""

    params: tuple[tvm.tirx.Buffer, ...]
    operation: Operation | None
    template: Template[Any] | None
    decisions: Decisions

    def takes(self, what: str) -> bool:
        """Whether its template can do this too, and does not yet."""
        return self.template is not None and what in self.template.takes and not getattr(self.operation, what)


class Fuser:
    """Fuses kernels of one model, whose programs are `alone`, and has the programs of those that came of it."""

    def __init__(
        self, kernels: Mapping[str, tvm.IRModule], gpu: Gpu, alone: Mapping[str, Program], accept: Accept | None = None
    ) -> None:
        self._gpu, self._alone, self._accept = gpu, alone, accept
        self._known = {name: _known(kernel["main"]) for name, kernel in kernels.items()}
        self._refused: set[str] = set()
        self.programs: dict[str, Program] = {}

    def fused(self, invoked: Sequence[Invoked], kept: int) -> list[Invoked]:
        """The same work in fewer launches. The buffer at `kept` is read when all is done."""
        found = list(invoked)
        i = 0
        while i + 1 < len(found):
            one = self._pair(found, i, kept)
            if one:
                found[i : i + 2] = [one]
                i = max(0, i - 1)
            else:
                i += 1
        return found

    def _pair(self, invoked: Sequence[Invoked], i: int, kept: int) -> Invoked | None:
        """Two neighbours as one, where nobody else reads what is between them."""
        first, second = invoked[i], invoked[i + 1]
        one, two = self._known[first.kernel], self._known[second.kernel]
        between, out = first.buffers[-1], second.buffers[-1]
        if between != second.buffers[0] or between == kept or _read_later(invoked[i + 2 :], between):
            return None
        if out in first.buffers[:-1]:  # it would overwrite what other blocks still read
            return None
        if isinstance(one.operation, RmsNorm) and isinstance(two.operation, Matmul) and two.takes("norm"):
            if one.operation.residual:
                return None
            operation: Operation = replace(two.operation, norm=one.operation.epsilon)
            known = replace(two, operation=operation, params=one.params[:2] + two.params[1:])
            buffers = first.buffers[:2] + second.buffers[1:]
        elif isinstance(two.operation, SiluMul) and isinstance(one.operation, Matmul) and one.takes("gate"):
            if one.operation.residual or one.operation.bias or two.operation.extras():
                return None
            operation = replace(one.operation, gate=True)
            known = replace(one, operation=operation, params=one.params[:-1] + two.params[1:])
            buffers = first.buffers[:-1] + second.buffers[1:]
        else:
            return None
        return self._invoked(first, second, known, buffers)

    def _invoked(self, first: Invoked, second: Invoked, known: _Known, buffers: tuple[int, ...]) -> Invoked | None:
        """The fused kernel over its buffers; None where its outputs do not come in whole blocks, or it is refused."""
        name = f"{first.kernel}_{second.kernel}"
        text = known.template.text if known.template else None
        if name not in self.programs and text:
            if name in self._refused:
                return None
            try:
                program = text(known.operation, known.decisions, self._gpu)
            except ValueError:
                return None
            if self._accept and not self._accept(self._compared(name, first, second, (program, buffers))):
                self._refused.add(name)
                return None
            self.programs[name], self._known[name] = program, known
        return Invoked(name, buffers)

    def _compared(self, name: str, first: Invoked, second: Invoked, fused: tuple[Program, tuple[int, ...]]) -> Pair:
        programs = {**self._alone, **self.programs}
        params: dict[int, tvm.tirx.Buffer] = {}
        for each in (first, second):
            params.update(zip(each.buffers, self._known[each.kernel].params, strict=True))
        return Pair(name, tuple((programs[each.kernel], each.buffers) for each in (first, second)), fused, params)


def _known(func: tvm.tirx.PrimFunc) -> _Known:
    template, decisions = templates.chosen(func) or (None, {})
    return _Known(tuple(func.params), gpu_kernels.operation(func), template, decisions)


def _read_later(invoked: Sequence[Invoked], place: int) -> bool:
    """Whether a buffer is read before it is written again."""
    for each in invoked:
        if place in each.buffers[:-1]:
            return True
        if place == each.buffers[-1]:
            return False
    return False
