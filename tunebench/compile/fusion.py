"""Neighbours in a plan become one launch: a product of one row takes the normalisation before it and the gate after it.

A launch costs a GPU API a few microseconds, as much as these small kernels take. Only products whose schedule is a
template that can do both are fused, with the decisions that the search made for the product alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class _Known:
    """What there is to know of a kernel."""

    operation: Operation | None
    template: Template[Any] | None
    decisions: Decisions

    def takes(self, what: str) -> bool:
        """Whether its template can do this too, and does not yet."""
        return self.template is not None and what in self.template.takes and not getattr(self.operation, what)


class Fuser:
    """Fuses kernels of one model, and has the programs of those that came of it."""

    def __init__(self, kernels: Mapping[str, tvm.IRModule], gpu: Gpu) -> None:
        self._gpu = gpu
        self._known = {name: _known(kernel["main"]) for name, kernel in kernels.items()}
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
            known = replace(two, operation=replace(two.operation, norm=one.operation.epsilon))
            buffers = first.buffers[:2] + second.buffers[1:]
        elif isinstance(two.operation, SiluMul) and isinstance(one.operation, Matmul) and one.takes("gate"):
            if one.operation.residual:
                return None
            known = replace(one, operation=replace(one.operation, gate=True))
            buffers = first.buffers[:-1] + second.buffers[1:]
        else:
            return None
        return self._invoked(f"{first.kernel}_{second.kernel}", known, buffers)

    def _invoked(self, name: str, known: _Known, buffers: tuple[int, ...]) -> Invoked | None:
        """The fused kernel over its buffers; None where its outputs do not come in whole blocks."""
        text = known.template.text if known.template else None
        if name not in self.programs and text:
            try:
                self.programs[name] = text(known.operation, known.decisions, self._gpu)
            except ValueError:
                return None
            self._known[name] = known
        return Invoked(name, buffers)


def _known(func: tvm.tirx.PrimFunc) -> _Known:
    template, decisions = templates.chosen(func) or (None, {})
    return _Known(gpu_kernels.operation(func), template, decisions)


def _read_later(invoked: Sequence[Invoked], place: int) -> bool:
    """Whether a buffer is read before it is written again."""
    for each in invoked:
        if place in each.buffers[:-1]:
            return True
        if place == each.buffers[-1]:
            return False
    return False
