"""Build kernels in worker processes on all cores, check and time them one after the other on the GPU.

Builders import TVM once and never touch the GPU; what they compiled reaches the process that measures as a
cubin. That process takes a candidate as soon as it is built, while others are still being compiled. A
kernel is timed as a CUDA graph of many calls over rotating inputs that are larger than the L2, between two
events: what a call takes there is what it takes in a graph of a decode step.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import tvm
from tvm.support.popen_pool import PopenPoolExecutor, PopenWorker

from tunebench import cublas, cuda_compiler, cuda_runtime, lowering  # noqa: F401  (cublas: kernels call it)
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
    mismatch,
    written,
)

RUN_TIMEOUT_S = 60.0
GRAPH_NS = 400_000  # at least, of the calls in one graph
MOST_CALLS = 256
LONG_NS = 2_000_000
LAUNCH_NS = 300_000  # what a single call may take beyond its kernel


class CudaRunner:
    """Builders and one process on the GPU."""

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
        del self._pool
        self._folder.cleanup()

    def prepare(self, job: Job, protocol: Protocol) -> Outcome:
        """Run the default schedule."""
        self._prepared.add(job.name)
        return self._ask(_prepare, job, protocol)

    def build(self, candidates: Sequence[tuple[str, tvm.IRModule]]) -> dict[str, str]:
        """Begin to compile; `time` waits for each."""
        for name, mod in candidates:
            mod_json = tvm.ir.save_json(lowering.realize(mod))
            self._built[name] = mod_json, self._pool.submit(_build, mod_json)
        return {}

    def time(self, job: Job, name: str, protocol: Protocol, limit_ns: int) -> Outcome:
        """Check and time a candidate once it is built."""
        mod_json, built = self._built[name]
        try:
            error = built.result()
        except Exception as lost:  # a builder that crashed or took too long
            error = brief(lost)
        if error:
            return Outcome(error=error)
        if job.name not in self._prepared:
            self.prepare(job, REFERENCE_ONLY)
        return self._ask(_check_and_time, job, mod_json, protocol, limit_ns)

    def duel(
        self, job: Job, candidates: Sequence[tuple[str, tvm.IRModule]], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved."""
        mods = [(name, tvm.ir.save_json(lowering.realize(mod))) for name, mod in candidates]
        outcomes = self._ask(_duel, job, mods, protocol, with_default)
        return outcomes if isinstance(outcomes, dict) else dict.fromkeys((name for name, _ in mods), outcomes)

    def forget(self) -> None:
        """Drop what was built."""
        self._built.clear()

    def _ask(self, function: Callable[..., object], *args: object) -> Outcome:
        if not self._worker.is_alive():
            self._worker = self._start()
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
    bench: _Bench | None = None


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
    cuda_compiler.install(Path(folder))


def _ready() -> bool:
    return True


class _Bench:
    """Input sets of one job on the GPU and its reference outputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        reference = tvm.ir.load_json(job.reference)
        self.default = compiled(job.reference, _worker.target)
        self.inputs = inputs(reference, job.depth, np.random.default_rng(0))
        touched = sum(
            _touched_bytes(p, a, job.depth) for p, a in zip(reference["main"].params, self.inputs, strict=True)
        )
        count = max(1, min(MAX_SETS, math.ceil(job.cold_bytes / touched)))
        first = [_tensor(array) for array in self.inputs]
        self.sets = [first] + [[_copy(tensor) for tensor in first] for _ in range(count - 1)]
        cuda_runtime.DEVICE.sync()  # copies are on another stream
        self.turn = 0
        self.expected = self._outputs(self.default, written(reference))

    def _outputs(self, kernel: _Kernel, wanted: list[int]) -> dict[int, np.ndarray]:
        """Run once on fresh buffers; the output buffer starts as garbage, so what is not written shows."""
        buffers = list(self.sets[0])
        for i in {*wanted, len(buffers) - 1}:
            start = self.inputs[i].copy()
            if i == len(buffers) - 1:
                start.view(np.uint8)[...] = 0xFF  # NaN in every float type
            buffers[i] = _tensor(start)
        _worker.stream.run(lambda: kernel(*buffers))
        return {i: buffers[i].numpy() for i in wanted}

    def check(self, kernel: _Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        outputs = self._outputs(kernel, list(self.expected))
        half = any(array.dtype == np.float16 for array in self.inputs)
        return next(filter(None, (mismatch(array, self.expected[i], half) for i, array in outputs.items())), "")

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


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array, cuda_runtime.DEVICE)


def _copy(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.empty(tensor.shape, tensor.dtype, cuda_runtime.DEVICE).copyfrom(tensor)


def _bench(job: Job) -> _Bench:
    if _worker.bench is None or _worker.bench.job.name != job.name:
        _worker.bench = None  # free the last one's inputs first
        _worker.bench = _Bench(job)
    return _worker.bench


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
