"""Kernels on CUDA: builders leave cubins, and a kernel is timed as a graph of many calls between two events.

The calls rotate over inputs that are larger than the L2: what a call takes there is what it takes in a graph of a
decode step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tvm

from tunebench.compile import nvrtc
from tunebench.dtypes import DTYPES
from tunebench.kernels import templates
from tunebench.kernels.templates import Param
from tunebench.runners.base import Job, compiled, inputs, sets_of, too_far, written
from tunebench.runners.gpu import Kernel, calls_of_a_sample
from tunebench.runtime import cuda as cuda_runtime

DIFFER_BLOCKS, DIFFER_THREADS = 256, 512


class _Here:
    """The state of one worker process."""

    target: tvm.target.Target
    stream: cuda_runtime.Stream


_here = _Here()


def start_builder(target: str, folder: str) -> None:
    """TVM compiles through `cuda_compiler`, which keeps cubins in the folder."""
    _here.target = tvm.ir.load_json(target)
    nvrtc.install(Path(folder))


def build(mod_json: str) -> None:
    """Leave the candidate's cubin where `cuda_compiler` finds it."""
    nvrtc.build(tvm.ir.load_json(mod_json), _here.target)


def start_measuring(target: str, folder: str) -> None:
    """As a builder, with a stream."""
    start_builder(target, folder)
    _here.stream = cuda_runtime.Stream()


@functools.cache
def most_bytes() -> int:
    """A quarter of what was free at first."""
    return cuda_runtime.free_bytes() // 4


def wait() -> None:
    """Until the stream is done."""
    _here.stream.wait()


def new_bench(job: Job) -> CudaBench:
    """The inputs of a job."""
    return CudaBench(job)


class CudaBench:
    """Input sets of one job on the GPU and its reference outputs."""

    def __init__(self, job: Job) -> None:
        self.job = job
        reference = tvm.ir.load_json(job.reference)
        params = reference["main"].params
        self.default = compiled(job.reference, _here.target)
        arrays = inputs(reference, job.depth, np.random.default_rng(0))
        self.half = any(array.dtype == np.float16 for array in arrays)
        count = sets_of(job, params, arrays)
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

    def _run(self, kernel: Kernel, into: dict[int, tvm.runtime.Tensor]) -> None:
        """Run once; what the kernel writes goes into these, of which the output is NaN before, so that gaps show."""
        stream = _here.stream
        for i, tensor in into.items():
            if i == self.output:
                stream.fill(tensor, 0xFF, cuda_runtime.size_bytes(tensor))
            else:
                stream.copy(tensor, self.before[i], cuda_runtime.size_bytes(tensor))
        buffers = [into.get(i, tensor) for i, tensor in enumerate(self.sets[0])]
        stream.run(lambda: kernel(*buffers))

    def check(self, kernel: Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        self._run(kernel, self.found)
        for i, tensor in self.found.items():
            dtype = str(tensor.dtype)
            worst, largest = _distance(tensor, self.expected[i])
            wrong = too_far(worst, largest, "float16" if self.half and dtype == "float32" else dtype)
            if wrong:
                return wrong
        return ""

    def load(self, mod_json: str) -> Kernel:
        """A kernel ready to run."""
        return compiled(mod_json, _here.target)

    def once_ns(self, kernel: Kernel) -> float:
        """One call on the next input set."""
        return _here.stream.elapsed_ns(lambda: self.call(kernel))

    def call(self, kernel: Kernel) -> None:
        """One call on the next input set."""
        self.turn = (self.turn + 1) % len(self.sets)
        kernel(*self.sets[self.turn])

    def arm(self, kernel: Kernel) -> Callable[[], int]:
        """A sample: nanoseconds of a call in a graph of many."""
        stream = _here.stream
        calls = calls_of_a_sample(self.once_ns(kernel), len(self.sets))

        def many() -> None:
            for _ in range(calls):
                self.call(kernel)

        graph = stream.record(many)
        return lambda: round(stream.elapsed_ns(graph.launch) / calls)


def _copy(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    return tvm.runtime.empty(tensor.shape, tensor.dtype, cuda_runtime.DEVICE).copyfrom(tensor)


def _distance(found: tvm.runtime.Tensor, expected: tvm.runtime.Tensor) -> tuple[float, float]:
    """The largest difference, infinite where there is a NaN, and the largest expected value."""
    size, dtype = math.prod(int(extent) for extent in found.shape), str(found.dtype)
    results = tvm.runtime.empty((2, DIFFER_BLOCKS), "float32", cuda_runtime.DEVICE)
    flat = [tensor._create_view((size,)) for tensor in (found, expected)]
    kernel = _differ(size, dtype)
    _here.stream.run(lambda: kernel(*flat, results))
    worst, largest = results.numpy().max(axis=1)
    return float(worst), float(largest)


@functools.cache
def _differ(size: int, dtype: str) -> Kernel:
    func = templates.extern_kernel(
        [Param("a", (size,), dtype), Param("b", (size,), dtype), Param("found", (2, DIFFER_BLOCKS), "float32")],
        (DIFFER_BLOCKS,),
        DIFFER_THREADS,
        f"tb::differ<{DTYPES[dtype].cuda}, {size}, {DIFFER_THREADS}>",
        ["a", "b", "found"],
    )
    kernel: Kernel = tvm.compile(tvm.IRModule({"main": func}), target=_here.target)["main"]
    return kernel
