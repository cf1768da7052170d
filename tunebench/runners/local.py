"""Build, check and time kernels on a device of TVM's own runtime here, in worker processes that import TVM once.

A worker compiles in memory (no system compiler is needed) and times what it compiled. Builds go to all
workers at once, timing to one at a time while the others wait, so that the two never share the cores.
A kernel that crashes or hangs takes its worker down and nothing else; the worker is started again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tunebench.dtypes import numpy_dtype
from tunebench.runners import worker
from tunebench.runners.base import (
    BUILD_TIMEOUT_S,
    LONG_TIMEOUT_S,
    REFERENCE_ONLY,
    Candidate,
    Failed,
    MeasureInput,
    Outcome,
    Trial,
    for_each,
)
from tunebench.runners.bench import Buffer, Kernel, Primitives, Rotation, Sampler
from tunebench.runners.worker import Process
from tunebench.timing import Protocol

LEAST_TIMEOUT_S = 10.0
MOST_HELD = 64  # compiled candidates of a worker


class LocalRunner:
    """Worker processes on this machine. Close it when done."""

    builds_ahead, queued_s = False, 0.0

    def __init__(self, target: tvm.target.Target, threads: int, workers: int, device: str = "cpu") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        setup = (str(tvm.ir.save_json(target)), device, self._folder.name)
        with _environment(TVM_NUM_THREADS=str(threads)):
            self._workers = [Process(LocalPrimitives, *setup) for _ in range(workers)]
        self._threads = threads
        self._built: dict[str, tuple[int, str]] = {}  # candidate -> the worker that built it, and its module
        self._prepared: set[str] = set()  # kernels whose reference outputs are on disk

    def close(self) -> None:
        """End the workers and drop what they compiled."""
        for process in self._workers:
            process.kill()
        self._folder.cleanup()

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def prepare(self, given: MeasureInput, protocol: Protocol) -> Outcome:
        """Run the default schedule: its times, and the outputs that candidates are compared with."""
        self._prepared.add(given.name)
        return self._ask(0, LONG_TIMEOUT_S, worker.prepare, given, protocol)  # type: ignore[no-any-return]

    def build(self, trial: Trial, candidates: Sequence[Candidate]) -> dict[str, Failed]:
        """Compile candidates on all workers; those that failed, by name."""
        self._built.clear()
        failed: dict[str, Failed] = {}
        for i in range(0, len(candidates), len(self._workers)):
            sent = list(enumerate(candidates[i : i + len(self._workers)]))
            for index, candidate in sent:
                self._built[candidate.name] = index, candidate.json
                with _environment(TVM_NUM_THREADS=str(self._threads)):
                    self._workers[index].send(BUILD_TIMEOUT_S, worker.build, candidate.json)
            answers = {candidate.name: self._workers[index].receive() for index, candidate in sent}
            failed |= {name: answer for name, answer in answers.items() if answer}
        return failed

    def time(self, trial: Trial, name: str) -> Outcome:
        """Check a built candidate against the reference, then time it."""
        if trial.given.name not in self._prepared:  # an earlier run timed its default; a slow one must not count here
            self.prepare(trial.given, REFERENCE_ONLY)
        index, mod_json = self._built[name]
        limit_s = max(LEAST_TIMEOUT_S, 20 * trial.limit_ns / 1e9)
        if not self._workers[index].is_alive:  # another candidate took it down: it compiles this one again
            limit_s += BUILD_TIMEOUT_S
        args = (trial.given, mod_json, trial.protocol, trial.limit_ns)
        return self._ask(index, limit_s, worker.check_and_time, *args)  # type: ignore[no-any-return]

    def compare(
        self, given: MeasureInput, candidates: Sequence[Candidate], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved with each other and the default (named `default`)."""
        built = {candidate.name: candidate.json for candidate in candidates}
        return for_each(self._ask(0, LONG_TIMEOUT_S, worker.compare, given, built, protocol, with_default), built)

    def _ask(self, index: int, timeout_s: float, function: Callable[..., Any], *args: object) -> Any:
        with _environment(TVM_NUM_THREADS=str(self._threads)):  # in case it is started again
            return self._workers[index].ask(timeout_s, function, *args)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class LocalPrimitives(Primitives):
    """A device of TVM's runtime, timed by the host's clock."""

    def __init__(self, target: str, device: str, folder: str) -> None:
        self._target, self._device = tvm.ir.load_json(target), tvm.device(device)
        self._folder = Path(folder)
        self._held: dict[str, Kernel] = {}

    def allocate(self, array: np.ndarray) -> Buffer:
        """A tensor."""
        return tvm.runtime.tensor(array, self._device)

    def duplicate(self, buffer: Buffer) -> Buffer:
        """Another tensor."""
        return buffer.copyto(tvm.runtime.empty(buffer.shape, buffer.dtype, self._device))

    def restore(self, to: Buffer, source: Buffer) -> None:
        """By TVM."""
        source.copyto(to)

    def read(self, buffer: Buffer) -> np.ndarray:
        """By TVM."""
        self._device.sync()
        return np.asarray(buffer.numpy())

    def build(self, mod_json: str) -> None:
        """Compile in memory; `load` finds it."""
        while len(self._held) >= MOST_HELD:
            self._held.pop(next(iter(self._held)))
        self._held[mod_json] = tvm.compile(tvm.ir.load_json(mod_json), target=self._target)["main"]

    def load(self, built: str) -> Kernel:
        """What was built here, or is now."""
        if built not in self._held:
            self.build(built)
        return self._held[built]

    def run(self, kernel: Kernel, buffers: Sequence[Buffer]) -> None:
        """A call."""
        kernel(*buffers)

    def sampler(self, kernel: Kernel, rotation: Rotation) -> Sampler:
        """Each call until the device is done."""

        def sample(calls: int) -> int:
            start = time.perf_counter_ns()
            for _ in range(calls):
                kernel(*rotation.next())
                self._device.sync()
            return (time.perf_counter_ns() - start) // calls

        return sample

    def remember(self, name: str, compute: Callable[[], dict[int, Any]]) -> dict[int, Any]:
        """On disk, for all workers: default schedules may be slow."""
        path = self._folder / f"{name}.npz"
        if not path.exists():
            outputs = compute()
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
                np.savez(file, **{f"{i} {a.dtype}": a.view(f"u{a.dtype.itemsize}") for i, a in outputs.items()})
            os.replace(file.name, path)
            return outputs
        with np.load(path) as data:
            names = {name: name.split() for name in data.files}
            return {int(i): data[name].view(numpy_dtype(dtype)) for name, (i, dtype) in names.items()}
