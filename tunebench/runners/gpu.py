"""Build kernels in worker processes on all cores; check and time them one after the other in one process on a GPU.

Builders import TVM once and never touch the GPU; what they made reaches the process that measures through a folder.
That process takes a candidate as soon as it is built, while others are still being compiled. How kernels are built and
run is the business of a module, the runner's own, which has the functions of `Way`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any
from typing import Protocol as Interface

import tvm
from tvm.support.popen_pool import PopenPoolExecutor, PopenWorker

from tunebench.compile import passes
from tunebench.errors import brief
from tunebench.runners.base import BUILD_TIMEOUT_S, REFERENCE_ONLY, START_TIMEOUT_S, Job, Outcome, Trial
from tunebench.timing import Protocol, Samples, interleave

RUN_TIMEOUT_S = 60.0
LAUNCH_NS = 300_000  # what a single call may take beyond its kernel
SAMPLE_NS = 400_000  # at least, of the calls that make a sample
MOST_CALLS = 256
LONG_NS = 2_000_000

Kernel = Any
"""A compiled kernel, as its bench has it."""


def calls_of_a_sample(once_ns: float, sets: int) -> int:
    """How many calls a sample is the mean of, by what one takes and how many input sets there are."""
    if once_ns > LONG_NS:  # one call fills the caches and more
        return 1
    return min(MOST_CALLS, max(sets, math.ceil(SAMPLE_NS / max(1.0, once_ns))))


class Bench(Interface):
    """Input sets of one job on the GPU and its reference outputs."""

    default: Kernel
    held_bytes: int

    def load(self, mod_json: str) -> Kernel:
        """A kernel ready to run, from a module as JSON."""
        ...

    def check(self, kernel: Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        ...

    def once_ns(self, kernel: Kernel) -> float:
        """One call on the next input set."""
        ...

    def arm(self, kernel: Kernel) -> Callable[[], int]:
        """A sample: nanoseconds of a call among many, each on the next input set."""
        ...


class Way(Interface):
    """A runner's module, as its worker processes use it."""

    def start_builder(self, target: str, folder: str) -> None:
        """Begin a builder; a target as JSON, and the folder that all processes share."""
        ...

    def build(self, mod_json: str) -> None:
        """Compile a kernel as far as that goes without the GPU, and leave it in the folder."""
        ...

    def start_measuring(self, target: str, folder: str) -> None:
        """Begin the process that measures."""
        ...

    def most_bytes(self) -> int:
        """What inputs of all jobs together may hold."""
        ...

    def wait(self) -> None:
        """Until the GPU is done; fails, and so ends the process, where its state is lost."""
        ...

    def new_bench(self, job: Job) -> Bench:
        """The inputs of a job."""
        ...


class GpuRunner:
    """Builders and one process on the GPU, which work the way of `module`."""

    builds_ahead, queued_s = True, 0.0

    def __init__(self, target: tvm.target.Target, builders: int, module: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        self._setup = (module, tvm.ir.save_json(target), self._folder.name)
        self._pool = PopenPoolExecutor(
            max_workers=builders, timeout=BUILD_TIMEOUT_S, initializer=_start_builder, initargs=self._setup
        )
        self._worker = self._start()
        self._built: dict[str, tuple[str, Future[str]]] = {}
        self._prepared: set[str] = set()

    def _start(self) -> PopenWorker:
        worker = PopenWorker(_start_measuring, self._setup, stderr=subprocess.DEVNULL)
        worker.send(_ready, timeout=START_TIMEOUT_S)
        worker.recv()
        return worker

    def close(self) -> None:
        """End the workers and drop what they compiled."""
        self._worker.kill()
        for _, built in self._built.values():
            built.cancel()
        self._pool.shutdown(wait=True)
        self._folder.cleanup()

    def prepare(self, job: Job, protocol: Protocol) -> Outcome:
        """Run the default schedule, once it is built where that has begun."""
        if job.name in self._built:
            with contextlib.suppress(Exception):  # it will fail again, and say why
                self._built.pop(job.name)[1].result()
        outcome = self._ask(_prepare, job, protocol)
        if not outcome.error:
            self._prepared.add(job.name)
        return outcome

    def build(self, candidates: Sequence[tuple[str, tvm.IRModule]], trial: Trial | None = None) -> dict[str, str]:
        """Begin to compile; `time` waits for each."""
        for name, mod in candidates:
            mod_json = tvm.ir.save_json(passes.realize(mod))
            self._built[name] = mod_json, self._pool.submit(_build, mod_json)
        return {}

    def time(self, job: Job, name: str, protocol: Protocol, limit_ns: int) -> Outcome:
        """Check and time a candidate once it is built."""
        mod_json, built = self._built.pop(name)
        try:
            error = built.result()
        except Exception as lost:  # a builder that crashed or took too long
            error = brief(lost)
        if error:
            return Outcome(error=error)
        if job.name not in self._prepared:
            outcome = self.prepare(job, REFERENCE_ONLY)
            if outcome.error:
                return outcome
        return self._ask(_check_and_time, job, mod_json, protocol, limit_ns)

    def duel(
        self, job: Job, candidates: Sequence[tuple[str, tvm.IRModule]], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved."""
        mods = [(name, tvm.ir.save_json(passes.realize(mod))) for name, mod in candidates]
        outcomes = self._ask(_duel, job, mods, protocol, with_default)
        return outcomes if isinstance(outcomes, dict) else dict.fromkeys((name for name, _ in mods), outcomes)

    def forget(self) -> None:
        """Nothing: what was timed is dropped, and the rest is still to be timed."""

    def _ask(self, function: Callable[..., object], *args: object) -> Outcome:
        if not self._worker.is_alive():
            self._worker = self._start()
            self._prepared.clear()
        self._worker.send(function, args, timeout=RUN_TIMEOUT_S)
        try:
            return self._worker.recv()  # type: ignore[no-any-return]
        except TimeoutError:
            error = "timed out"
        except (ChildProcessError, RuntimeError, OSError) as lost:
            error = brief(lost)
        self._worker.kill()  # after an error of the GPU nothing in that process works
        return Outcome(error=error)


# -- in a worker ------------------------------------------------------------------------------------------


class _Worker:
    """The state of one worker process."""

    way: Way
    benches: dict[str, Bench] = {}  # noqa: RUF012  (one object of this class in a process)


_worker = _Worker()


def _start_builder(module: str, target: str, folder: str) -> None:
    _worker.way = importlib.import_module(module)
    _worker.way.start_builder(target, folder)


def _build(mod_json: str) -> str:
    """Why a kernel cannot be built, or an empty string."""
    try:
        _worker.way.build(mod_json)
    except Exception as error:  # whatever code generation raises is the candidate's fault
        return brief(error)
    return ""


def _start_measuring(module: str, target: str, folder: str) -> None:
    _worker.way = importlib.import_module(module)
    _worker.way.start_measuring(target, folder)


def _ready() -> bool:
    return True


def _bench(job: Job) -> Bench:
    """The job's inputs, kept from before or made now in the place of those that were used longest ago."""
    bench = _worker.benches.pop(job.name, None)
    while bench is None and sum(each.held_bytes for each in _worker.benches.values()) > _worker.way.most_bytes():
        _worker.benches.pop(next(iter(_worker.benches)))
    bench = bench or _worker.way.new_bench(job)
    _worker.benches[job.name] = bench
    return bench


def _time(bench: Bench, kernels: dict[str, Kernel], protocol: Protocol) -> dict[str, Samples]:
    arms = {name: bench.arm(kernel) for name, kernel in kernels.items()}
    return interleave(arms, protocol, take=lambda call, calls: call())


def _prepare(job: Job, protocol: Protocol) -> Outcome:
    bench = _bench(job)
    return Outcome(tuple(_time(bench, {"default": bench.default}, protocol)["default"].samples_ns))


def _check_and_time(job: Job, mod_json: str, protocol: Protocol, limit_ns: int) -> Outcome:
    bench = _bench(job)
    try:
        kernel = bench.load(mod_json)
        wrong = bench.check(kernel)
    except Exception as error:  # whatever the candidate raises
        _worker.way.wait()
        wrong = brief(error)
    if wrong:
        return Outcome(error=wrong)
    first = round(bench.once_ns(kernel))
    if first > limit_ns + LAUNCH_NS:
        return Outcome((first,))
    return Outcome(tuple(_time(bench, {"it": kernel}, protocol)["it"].samples_ns))


def _duel(job: Job, mods: list[tuple[str, str]], protocol: Protocol, with_default: bool) -> dict[str, Outcome]:
    bench = _bench(job)
    outcomes: dict[str, Outcome] = {}
    kernels: dict[str, Kernel] = {"default": bench.default} if with_default else {}
    for name, mod_json in mods:
        kernel = bench.load(mod_json)
        wrong = bench.check(kernel)
        if wrong:
            outcomes[name] = Outcome(error=wrong)
        else:
            kernels[name] = kernel
    timed = _time(bench, kernels, protocol)
    return {**outcomes, **{name: Outcome(tuple(samples.samples_ns)) for name, samples in timed.items()}}
