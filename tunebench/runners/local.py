"""Build, check and time kernels on a device of TVM's own runtime here, in worker processes that import TVM once.

A worker compiles in memory (no system compiler is needed) and times what it compiled. Builds go to all
workers at once, timing to one at a time while the others wait, so that the two never share the cores.
A kernel that crashes or hangs takes its worker down and nothing else; the worker is started again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm.support.popen_pool import PopenWorker

from tunebench.errors import brief
from tunebench.runners.base import (
    BUILD_TIMEOUT_S,
    LOST,
    MAX_SETS,
    REFERENCE_ONLY,
    START_TIMEOUT_S,
    Job,
    Outcome,
    Trial,
    bits,
    compiled,
    inputs,
    mismatch,
)
from tunebench.timing import Protocol, Samples, interleave

LONG_TIMEOUT_S = 3600.0  # of what runs a default schedule, which nothing bounds


class LocalRunner:
    """Worker processes on this machine. Close it when done."""

    builds_ahead, queued_s = False, 0.0

    def __init__(self, target: tvm.target.Target, threads: int, workers: int, device: str = "cpu") -> None:
        self._target, self._device = tvm.ir.save_json(target), device
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        self._workers = [self._start() for _ in range(workers)]
        for worker in self._workers:
            worker.recv()
        self._home: dict[str, int] = {}  # candidate -> the worker that built it
        self._prepared: set[str] = set()  # jobs whose reference outputs are on disk

    def _start(self) -> PopenWorker:
        with _environment(TVM_NUM_THREADS=str(self._threads)):
            worker = PopenWorker(
                _initialize, (self._target, self._folder.name, self._device), stderr=subprocess.DEVNULL
            )
            worker.send(_ready, timeout=START_TIMEOUT_S)
        return worker

    def close(self) -> None:
        """End the workers and drop what they compiled."""
        for worker in self._workers:
            worker.kill()
        self._folder.cleanup()

    def prepare(self, job: Job, protocol: Protocol) -> Outcome:
        """Run the default schedule: its times, and the outputs that candidates are compared with."""
        self._prepared.add(job.name)
        return self._ask(0, LONG_TIMEOUT_S, _prepare, job, protocol)

    def build(self, candidates: Sequence[tuple[str, tvm.IRModule]], trial: Trial | None = None) -> dict[str, str]:
        """Compile candidates on all workers; each one's error, empty where it built."""
        errors: dict[str, str] = {}
        queues = [list(candidates[i :: len(self._workers)]) for i in range(len(self._workers))]
        while any(queues):
            sent = []
            for index, queue in enumerate(queues):
                if queue:
                    name, mod = queue.pop(0)
                    self._send(index, BUILD_TIMEOUT_S, _build, name, tvm.ir.save_json(mod))
                    sent.append((index, name))
            for index, name in sent:
                errors[name] = self._receive(index).error
                self._home[name] = index
        return errors

    def time(self, job: Job, name: str, protocol: Protocol, limit_ns: int) -> Outcome:
        """Check a built candidate against the reference, then time it; one call only if that takes over `limit_ns`."""
        if job.name not in self._prepared:  # an earlier run timed its default; a slow one must not count here
            self.prepare(job, REFERENCE_ONLY)
        timeout = max(10.0, 20 * limit_ns / 1e9)
        return self._ask(self._home[name], timeout, _check_and_time, job, name, protocol, limit_ns)

    def duel(
        self,
        job: Job,
        candidates: Sequence[tuple[str, tvm.IRModule]],
        protocol: Protocol,
        with_default: bool = True,
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved with each other and the default (named `default`)."""
        mods = [(name, tvm.ir.save_json(mod)) for name, mod in candidates]
        try:
            self._send(0, LONG_TIMEOUT_S, _duel, job, mods, protocol, with_default)
            outcomes: dict[str, Outcome] = self._workers[0].recv()
        except (TimeoutError, ChildProcessError, RuntimeError, OSError) as error:
            self._workers[0].kill()
            outcomes = {name: Outcome(error=brief(error)) for name, _ in candidates}
        return outcomes

    def forget(self) -> None:
        """Drop compiled candidates."""
        for index in range(len(self._workers)):
            self._ask(index, START_TIMEOUT_S, _forget)
        self._home.clear()

    def _ask(self, index: int, timeout: float, function: Callable[..., Outcome], *args: object) -> Outcome:
        self._send(index, timeout, function, *args)
        return self._receive(index)

    def _send(self, index: int, timeout: float, function: Callable[..., object], *args: object) -> None:
        if not self._workers[index].is_alive():
            self._workers[index] = self._start()
            self._workers[index].recv()
        self._workers[index].send(function, args, timeout=timeout)

    def _receive(self, index: int) -> Outcome:
        try:
            outcome: Outcome = self._workers[index].recv()
        except TimeoutError:
            self._workers[index].kill()
            return Outcome(error="timed out")
        except (ChildProcessError, RuntimeError, OSError) as error:
            self._workers[index].kill()
            return Outcome(error=brief(error))
        return outcome


@contextlib.contextmanager
def _environment(**values: str):  # type: ignore[no-untyped-def]
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# -- in a worker ------------------------------------------------------------------------------------------

_Kernel = Callable[..., object]


class _Worker:
    """The state of one worker process."""

    target: tvm.target.Target
    device: tvm.runtime.Device
    folder: Path
    kernels: dict[str, _Kernel]
    bench: _Bench | None


_worker = _Worker()


class _Bench:
    """Input sets of one job and its reference outputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reference_kernel = compiled(job.reference, _worker.target)
        self.inputs = inputs(tvm.ir.load_json(job.reference), job.depth, np.random.default_rng(0))
        size = sum(array.nbytes for array in self.inputs)
        count = max(1, min(MAX_SETS, -(-job.cold_bytes // size)))
        self.sets = [[tvm.runtime.tensor(array, _worker.device) for array in self.inputs] for _ in range(count)]
        self.turn = 0
        path = _worker.folder / f"{job.name}.npz"
        if not path.exists():
            self._save_reference(path)
        with np.load(path) as data:
            self.expected = {int(index): data[index] for index in data.files}

    def _save_reference(self, path: Path) -> None:
        outputs = self._outputs(self.reference_kernel, list(range(len(self.inputs))))
        last = len(self.inputs) - 1
        changed = [i for i, array in outputs.items() if i == last or not np.array_equal(array, self.inputs[i])]
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **{str(i): outputs[i].view(bits(outputs[i])) for i in changed})  # type: ignore[arg-type]
        os.replace(file.name, path)

    def _outputs(self, kernel: _Kernel, wanted: list[int]) -> dict[int, np.ndarray]:
        """Run once on fresh buffers; the output buffer starts as garbage, so what is not written shows."""
        buffers = list(self.sets[0])
        for i in {*wanted, len(buffers) - 1}:
            start = self.inputs[i].copy()
            if i == len(buffers) - 1:
                start.view(np.uint8)[...] = 0xFF  # NaN in every float type
            buffers[i] = tvm.runtime.tensor(start, _worker.device)
        kernel(*buffers)
        _worker.device.sync()
        return {i: buffers[i].numpy() for i in wanted}

    def check(self, kernel: _Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        for i, array in self._outputs(kernel, list(self.expected)).items():
            wrong = mismatch(array, self.expected[i])
            if wrong:
                return wrong
        return ""

    def call(self, kernel: _Kernel) -> None:
        """One call on the next input set."""
        self.turn = (self.turn + 1) % len(self.sets)
        kernel(*self.sets[self.turn])
        _worker.device.sync()


def _initialize(target: str, folder: str, device: str) -> None:
    _worker.target = tvm.ir.load_json(target)
    _worker.device = tvm.device(device)
    _worker.folder = Path(folder)
    _worker.kernels = {}
    _worker.bench = None


def _ready() -> bool:
    return True


def _bench(job: Job) -> _Bench:
    if _worker.bench is None or _worker.bench.job.name != job.name:
        _worker.bench = None  # free the last one's inputs first
        _worker.bench = _Bench(job)
    return _worker.bench


def _prepare(job: Job, protocol: Protocol) -> Outcome:
    bench = _bench(job)
    return Outcome(tuple(_time(bench, {"default": bench.reference_kernel}, protocol)["default"].samples_ns))


def _build(name: str, mod_json: str) -> Outcome:
    try:
        _worker.kernels[name] = compiled(mod_json, _worker.target)
    except Exception as error:  # whatever code generation raises is the candidate's fault
        return Outcome(error=brief(error))
    return Outcome()


def _check_and_time(job: Job, name: str, protocol: Protocol, limit_ns: int) -> Outcome:
    if name not in _worker.kernels:
        return Outcome(error=LOST)
    bench, kernel = _bench(job), _worker.kernels[name]
    wrong = bench.check(kernel)
    if wrong:
        return Outcome(error=wrong)
    once = Protocol(warmups=1, samples=1, least_samples=1)
    first = _time(bench, {name: kernel}, once)[name].samples_ns
    if first[0] > limit_ns:
        return Outcome(tuple(first))
    return Outcome(tuple(_time(bench, {name: kernel}, protocol)[name].samples_ns))


def _duel(job: Job, mods: list[tuple[str, str]], protocol: Protocol, with_default: bool) -> dict[str, Outcome]:
    bench = _bench(job)
    outcomes: dict[str, Outcome] = {}
    kernels: dict[str, _Kernel] = {"default": bench.reference_kernel} if with_default else {}
    for name, mod_json in mods:
        try:
            kernel = compiled(mod_json, _worker.target)
            wrong = bench.check(kernel)
        except Exception as error:  # whatever code generation raises is the candidate's fault
            wrong = brief(error)
        if wrong:
            outcomes[name] = Outcome(error=wrong)
        else:
            kernels[name] = kernel
    timed = _time(bench, kernels, protocol)
    return {**outcomes, **{name: Outcome(tuple(samples.samples_ns)) for name, samples in timed.items()}}


def _time(bench: _Bench, kernels: dict[str, _Kernel], protocol: Protocol) -> dict[str, Samples]:
    arms = {name: (lambda kernel=kernel: bench.call(kernel)) for name, kernel in kernels.items()}
    return interleave(arms, protocol)


def _forget() -> Outcome:
    _worker.kernels.clear()
    return Outcome()
