"""A runner without a device: it answers from stored times, so that a search can be tried, tested and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi

from tunebench.runners.base import Candidate, Failed, MeasureInput, Outcome, Trial
from tunebench.timing import Protocol

DEFAULT = "default"
Answer = Callable[[str, str], Outcome]
"""What became of a program of a task, both by their structural hash; `DEFAULT` is the task's default schedule."""


def program_key(mod: tvm.IRModule) -> str:
    """A scheduled kernel's name among stored times: the structural hash of its module."""
    return str(tvm_ffi.structural_hash(mod))


class ReplayRunner:
    """Answers at once; nothing is built, and nothing runs."""

    builds_ahead, queued_s = False, 0.0

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._built: dict[str, str] = {}

    def close(self) -> None:
        """Nothing to end."""

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, given: MeasureInput, protocol: Protocol) -> Outcome:
        """The default schedule's stored times."""
        return self._answer(given.name, DEFAULT)

    def build(self, trial: Trial, candidates: Sequence[Candidate]) -> dict[str, Failed]:
        """Remember which program each name stands for."""
        self._built |= {candidate.name: program_key(candidate.mod) for candidate in candidates}
        return {}

    def time(self, trial: Trial, name: str) -> Outcome:
        """A candidate's stored times."""
        return self._answer(trial.given.name, self._built.pop(name))

    def compare(
        self, given: MeasureInput, candidates: Sequence[Candidate], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """The stored times of each."""
        found = {candidate.name: self._answer(given.name, program_key(candidate.mod)) for candidate in candidates}
        return {**found, **({DEFAULT: self._answer(given.name, DEFAULT)} if with_default else {})}
