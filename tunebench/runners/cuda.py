"""Build kernels in worker processes on all cores, check and time them one after the other on the GPU.

Builders import TVM once and never touch the GPU; what they compiled reaches the process that measures as a
cubin. That process takes a candidate as soon as it is built, while others are still being compiled. A
kernel is timed as a CUDA graph of many calls over rotating inputs that are larger than the L2, between two
events: what a call takes there is what it takes in a graph of a decode step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import tvm
from tvm.support.popen_pool import PopenPoolExecutor, PopenWorker

from tunebench import cublas, cuda_compiler, cuda_runtime, lowering, templates  # noqa: F401  (cublas: kernels call it)
from tunebench.measure import Protocol, Samples, interleave
from tunebench.runners import (
    BUILD_TIMEOUT_S,
    MAX_SETS,
    REFERENCE_ONLY,
    START_TIMEOUT_S,
    Job,
    Outcome,
    brief,
    compiled,
    inputs,
    too_far,
    written,
)
from tunebench.templates import Param

RUN_TIMEOUT_S = 60.0
GRAPH_NS = 400_000  # at least, of the calls in one graph
MOST_CALLS = 256
LONG_NS = 2_000_000
DIFFER_BLOCKS, DIFFER_THREADS = 256, 512
LAUNCH_NS = 300_000  # what a single call may take beyond its kernel


class CudaRunner:
    """Builders and one process on the GPU."""

    builds_ahead = True

    def __init__(self, target: tvm.target.Target, builders: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        self._setup = (tvm.ir.save_json(target), self._folder.name)
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

    def build(self, candidates: Sequence[tuple[str, tvm.IRModule]]) -> dict[str, str]:
        """Begin to compile; `time` waits for each."""
        for name, mod in candidates:
            mod_json = tvm.ir.save_json(lowering.realize(mod))
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
        mods = [(name, tvm.ir.save_json(lowering.realize(mod))) for name, mod in candidates]
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


# -- in a builder -----------------------------------------------------------------------------------------


class _Worker:
    """The state of one worker process."""

    target: tvm.target.Target
    stream: cuda_runtime.Stream
    most_bytes: int
    benches: dict[str, _Bench] = {}  # noqa: RUF012  (one object of this class in a process)


_worker = _Worker()


def _start_builder(target: str, folder: str) -> None:
    _worker.target = tvm.ir.load_json(target)
    cuda_compiler.install(Path(folder))


def _build(mod_json: str) -> str:
    """Leave the candidate's cubin where `cuda_compiler` finds it; why that failed, or an empty string."""
    try:
        cuda_compiler.build(tvm.ir.load_json(mod_json), _worker.target)
    except Exception as error:  # whatever code generation raises is the candidate's fault
        return brief(error)
    return ""


# -- in the process on the GPU ----------------------------------------------------------------------------

_Kernel = Callable[..., object]


def _start_measuring(target: str, folder: str) -> None:
    _worker.target = tvm.ir.load_json(target)
    _worker.stream = cuda_runtime.Stream()
    _worker.most_bytes = cuda_runtime.free_bytes() // 4
    cuda_compiler.install(Path(folder))


def _ready() -> bool:
    return True


class _Bench:
    """Input sets of one job on the GPU and its reference outputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        reference = tvm.ir.load_json(job.reference)
        params = reference["main"].params
        self.default = compiled(job.reference, _worker.target)
        arrays = inputs(reference, job.depth, np.random.default_rng(0))
        self.half = any(array.dtype == np.float16 for array in arrays)
        touched = sum(_touched_bytes(p, a, job.depth) for p, a in zip(params, arrays, strict=True))
        count = max(1, min(MAX_SETS, math.ceil(job.cold_bytes / touched)))
        first = [tvm.runtime.tensor(array, cuda_runtime.DEVICE) for array in arrays]
        self.sets = [first] + [[_copy(tensor) for tensor in first] for _ in range(count - 1)]
        self.written = written(reference)
        self.output = len(first) - 1
        self.before = {i: _copy(first[i]) for i in self.written if i != self.output}
        self.expected = {i: _copy(first[i]) for i in self.written}
        self.found = {i: _copy(first[i]) for i in self.written}
        held = [*(t for each in self.sets for t in each)]
        held += [t for kept in (self.before, self.expected, self.found) for t in kept.values()]
        self.held_bytes = sum(map(cuda_runtime.size_bytes, held))
        self.turn = 0
        cuda_runtime.DEVICE.sync()  # copies are on another stream
        self._run(self.default, self.expected)

    def _run(self, kernel: _Kernel, into: dict[int, tvm.runtime.Tensor]) -> None:
        """Run once; what the kernel writes goes into these, of which the output is NaN before, so that gaps show."""
        stream = _worker.stream
        for i, tensor in into.items():
            if i == self.output:
                stream.fill(tensor, 0xFF, cuda_runtime.size_bytes(tensor))
            else:
                stream.copy(tensor, self.before[i], cuda_runtime.size_bytes(tensor))
        buffers = [into.get(i, tensor) for i, tensor in enumerate(self.sets[0])]
        stream.run(lambda: kernel(*buffers))

    def check(self, kernel: _Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        self._run(kernel, self.found)
        for i, tensor in self.found.items():
            dtype = str(tensor.dtype)
            worst, largest = _distance(tensor, self.expected[i])
            wrong = too_far(worst, largest, "float16" if self.half and dtype == "float32" else dtype)
            if wrong:
                return wrong
        return ""

    def call(self, kernel: _Kernel) -> None:
        """One call on the next input set."""
        self.turn = (self.turn + 1) % len(self.sets)
        kernel(*self.sets[self.turn])

    def arm(self, kernel: _Kernel) -> Callable[[], int]:
        """A sample: nanoseconds of a call in a graph of many."""
        stream = _worker.stream
        once = stream.elapsed_ns(lambda: self.call(kernel))
        calls = min(MOST_CALLS, max(len(self.sets), math.ceil(GRAPH_NS / max(1.0, once))))
        if once > LONG_NS:  # one call fills the caches and more
            calls = 1

        def many() -> None:
            for _ in range(calls):
                self.call(kernel)

        graph = stream.record(many)
        return lambda: round(stream.elapsed_ns(graph.launch) / calls)


def _touched_bytes(param: tvm.tirx.Buffer, array: np.ndarray, depth: int) -> float:
    """What a call reads or writes of an argument: of a cache, the positions up to the depth."""
    if param.name in ("keys", "values"):
        return float(array.nbytes * min(1.0, (depth + 1) / array.shape[2]))
    return float(array.nbytes)


def _copy(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.empty(tensor.shape, tensor.dtype, cuda_runtime.DEVICE).copyfrom(tensor)


def _distance(found: tvm.runtime.Tensor, expected: tvm.runtime.Tensor) -> tuple[float, float]:
    """The largest difference, infinite where there is a NaN, and the largest expected value."""
    size, dtype = math.prod(int(extent) for extent in found.shape), str(found.dtype)
    results = tvm.runtime.empty((2, DIFFER_BLOCKS), "float32", cuda_runtime.DEVICE)
    flat = [tensor._create_view((size,)) for tensor in (found, expected)]
    kernel = _differ(size, dtype)
    _worker.stream.run(lambda: kernel(*flat, results))
    worst, largest = results.numpy().max(axis=1)
    return float(worst), float(largest)


@functools.cache
def _differ(size: int, dtype: str) -> _Kernel:
    func = templates.extern_kernel(
        [Param("a", (size,), dtype), Param("b", (size,), dtype), Param("found", (2, DIFFER_BLOCKS), "float32")],
        (DIFFER_BLOCKS,),
        DIFFER_THREADS,
        f"tb::differ<{templates.C_TYPES[dtype]}, {size}, {DIFFER_THREADS}>",
        ["a", "b", "found"],
    )
    kernel: _Kernel = tvm.compile(tvm.IRModule({"main": func}), target=_worker.target)["main"]
    return kernel


def _bench(job: Job) -> _Bench:
    """The job's inputs, kept from before or made now in the place of those that were used longest ago."""
    bench = _worker.benches.pop(job.name, None)
    while bench is None and sum(each.held_bytes for each in _worker.benches.values()) > _worker.most_bytes:
        _worker.benches.pop(next(iter(_worker.benches)))
    bench = bench or _Bench(job)
    _worker.benches[job.name] = bench
    return bench


def _time(bench: _Bench, kernels: dict[str, _Kernel], protocol: Protocol) -> dict[str, Samples]:
    arms = {name: bench.arm(kernel) for name, kernel in kernels.items()}
    return interleave(arms, protocol, take=lambda call, calls: call())


def _prepare(job: Job, protocol: Protocol) -> Outcome:
    bench = _bench(job)
    return Outcome(tuple(_time(bench, {"default": bench.default}, protocol)["default"].samples_ns))


def _check_and_time(job: Job, mod_json: str, protocol: Protocol, limit_ns: int) -> Outcome:
    bench = _bench(job)
    try:
        kernel = compiled(mod_json, _worker.target)
        wrong = bench.check(kernel)
    except Exception as error:  # whatever the candidate raises
        _worker.stream.wait()  # fails, and so ends this process, where the GPU's state is lost
        wrong = brief(error)
    if wrong:
        return Outcome(error=wrong)
    first = round(_worker.stream.elapsed_ns(lambda: bench.call(kernel)))
    if first > limit_ns + LAUNCH_NS:
        return Outcome((first,))
    return Outcome(tuple(_time(bench, {"it": kernel}, protocol)["it"].samples_ns))


def _duel(job: Job, mods: list[tuple[str, str]], protocol: Protocol, with_default: bool) -> dict[str, Outcome]:
    bench = _bench(job)
    outcomes: dict[str, Outcome] = {}
    kernels: dict[str, _Kernel] = {"default": bench.default} if with_default else {}
    for name, mod_json in mods:
        kernel = compiled(mod_json, _worker.target)
        wrong = bench.check(kernel)
        if wrong:
            outcomes[name] = Outcome(error=wrong)
        else:
            kernels[name] = kernel
    timed = _time(bench, kernels, protocol)
    return {**outcomes, **{name: Outcome(tuple(samples.samples_ns)) for name, samples in timed.items()}}
