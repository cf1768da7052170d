"""Build kernels in worker processes on all cores; check and time them one after the other in one process on a GPU.

Builders import TVM once and never measure; what they made reaches the process that measures through a folder.
That process takes a candidate as soon as it is built, while others are still being compiled.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import tvm

from tunebench.compile import passes
from tunebench.errors import brief
from tunebench.runners import worker
from tunebench.runners.base import (
    BUILD_TIMEOUT_S,
    LONG_TIMEOUT_S,
    REFERENCE_ONLY,
    Candidate,
    Died,
    Failed,
    MeasureInput,
    NotBuilt,
    Outcome,
    Trial,
    for_each,
)
from tunebench.runners.bench import Primitives, Rules
from tunebench.runners.worker import Pool, Process
from tunebench.timing import Protocol

RUN_TIMEOUT_S = 60.0  # of a candidate
RULES = Rules(whole_rounds=True, launch_ns=300_000)
Make = Callable[[str, str], Primitives]
"""Opens a GPU: (a target as JSON, the folder that all processes share)."""


class GpuRunner:
    """Builders and one process on the GPU, all of which `make` begins."""

    builds_ahead, queued_s = True, 0.0

    def __init__(self, target: tvm.target.Target, builders: int, make: Make) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        setup = (make, str(tvm.ir.save_json(target)), self._folder.name)
        self._pool = Pool(max_workers=builders, timeout=BUILD_TIMEOUT_S, initializer=worker.start, initargs=setup)
        self._process = Process(*setup)
        self._built: dict[str, tuple[str, Future[NotBuilt | None]]] = {}
        self._prepared: set[str] = set()

    def close(self) -> None:
        """End the workers and drop what they compiled."""
        self._process.kill()
        for _, built in self._built.values():
            built.cancel()
        self._pool.shutdown(wait=True)
        self._folder.cleanup()

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, given: MeasureInput, protocol: Protocol) -> Outcome:
        """Run the default schedule, once it is built where that has begun."""
        if given.name in self._built:
            with contextlib.suppress(Exception):  # it will fail again, and say why
                self._built.pop(given.name)[1].result()
        outcome: Outcome = self._ask(LONG_TIMEOUT_S, worker.prepare, given, protocol)
        if not isinstance(outcome, Failed):
            self._prepared.add(given.name)
        return outcome

    def build(self, trial: Trial, candidates: Sequence[Candidate]) -> dict[str, Failed]:
        """Begin to compile; `time` waits for each."""
        for candidate in candidates:
            mod_json = _realized(candidate)
            self._built[candidate.name] = mod_json, self._pool.submit(worker.build, mod_json)
        return {}

    def time(self, trial: Trial, name: str) -> Outcome:
        """Check and time a candidate once it is built."""
        mod_json, built = self._built.pop(name)
        try:
            failed: Failed | None = built.result()
        except Exception as lost:  # a builder that crashed or took too long
            failed = Died(brief(lost))
        if failed:
            return failed
        if trial.given.name not in self._prepared:
            outcome = self.prepare(trial.given, REFERENCE_ONLY)
            if isinstance(outcome, Failed):
                return outcome
        args = (trial.given, mod_json, trial.protocol, trial.limit_ns)
        return self._ask(RUN_TIMEOUT_S, worker.check_and_time, *args)  # type: ignore[no-any-return]

    def compare(
        self, given: MeasureInput, candidates: Sequence[Candidate], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved."""
        built = {candidate.name: _realized(candidate) for candidate in candidates}
        return for_each(self._ask(LONG_TIMEOUT_S, worker.compare, given, built, protocol, with_default), built)

    def _ask(self, timeout_s: float, function: Callable[..., Any], *args: object) -> Any:
        if not self._process.is_alive:
            self._prepared.clear()
        return self._process.ask(timeout_s, function, *args)


def _realized(candidate: Candidate) -> str:
    """A candidate's module as JSON, with the kernel of the template that it chose."""
    return Candidate(candidate.name, passes.realize(candidate.mod)).json
