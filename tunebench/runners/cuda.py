"""Kernels on CUDA: builders leave cubins, and a kernel is timed as a graph of many calls between two events.

The calls rotate over inputs that are larger than the L2: what a call takes there is what it takes in a graph of a
decode step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import tvm

from tunebench.compile import nvrtc
from tunebench.dtypes import DTYPES
from tunebench.kernels import templates
from tunebench.kernels.templates import Param
from tunebench.runners.bench import Buffer, Kernel, Primitives, Rotation, Rules, Sampler
from tunebench.runners.gpu import RULES
from tunebench.runtime import cublas
from tunebench.runtime import cuda as cuda_runtime
from tunebench.runtime.cuda import size_bytes

DIFFER_BLOCKS, DIFFER_THREADS = 256, 512


class CudaPrimitives(Primitives):
    """This machine's first NVIDIA GPU; a process that only builds never touches it."""

    def __init__(self, target: str, folder: str) -> None:
        self._target, self._folder = tvm.ir.load_json(target), Path(folder)
        cublas.register()

    @functools.cached_property
    def rules(self) -> Rules:  # type: ignore[override]
        """A quarter of what is free at first is for input sets."""
        return replace(RULES, kept_bytes=cuda_runtime.free_bytes() // 4)

    @functools.cached_property
    def _stream(self) -> cuda_runtime.Stream:
        return cuda_runtime.Stream()

    def open(self) -> None:
        """A stream, and with it the GPU's state in this process."""
        self._stream.wait()

    def build(self, mod_json: str) -> None:
        """Leave the kernel's cubin in the folder."""
        with nvrtc.compiling(self._folder):
            nvrtc.build(tvm.ir.load_json(mod_json), self._target)

    def load(self, built: str) -> Kernel:
        """With the cubin of the folder, if it is there."""
        with nvrtc.compiling(self._folder):
            return tvm.compile(tvm.ir.load_json(built), target=self._target)["main"]

    def allocate(self, array: np.ndarray) -> Buffer:
        """A tensor; copies from the host are on another stream."""
        tensor = tvm.runtime.tensor(array, cuda_runtime.DEVICE)
        cuda_runtime.DEVICE.sync()
        return tensor

    def duplicate(self, buffer: Buffer) -> Buffer:
        """Another tensor."""
        tensor = tvm.runtime.empty(buffer.shape, buffer.dtype, cuda_runtime.DEVICE).copyfrom(buffer)
        cuda_runtime.DEVICE.sync()
        return tensor

    def restore(self, to: Buffer, source: Buffer) -> None:
        """On the stream."""
        self._stream.copy(to, source, size_bytes(to))

    def read(self, buffer: Buffer) -> np.ndarray:
        """Once the stream is done."""
        self._stream.wait()
        return np.asarray(buffer.numpy())

    def run(self, kernel: Kernel, buffers: Sequence[Buffer]) -> None:
        """On the stream."""
        self._stream.run(lambda: kernel(*buffers))

    def sampler(self, kernel: Kernel, rotation: Rotation) -> Sampler:
        """A graph of calls."""
        graphs: dict[int, cuda_runtime.Graph] = {}

        def call() -> None:
            kernel(*rotation.next())

        def many(calls: int) -> None:
            for _ in range(calls):
                call()

        def sample(calls: int) -> int:
            if calls == 1:
                return round(self._stream.elapsed_ns(call))
            if calls not in graphs:
                graphs[calls] = self._stream.record(lambda: many(calls))
            return round(self._stream.elapsed_ns(graphs[calls].launch) / calls)

        return sample

    def keep(self, buffer: Buffer) -> Buffer:
        """On the GPU."""
        return self.duplicate(buffer)

    def distance(self, found: Buffer, kept: Buffer) -> tuple[float, float]:
        """By a kernel; infinite where there is a NaN."""
        size, dtype = math.prod(int(extent) for extent in found.shape), str(found.dtype)
        results = tvm.runtime.empty((2, DIFFER_BLOCKS), "float32", cuda_runtime.DEVICE)
        flat = [tensor._create_view((size,)) for tensor in (found, kept)]
        kernel = self._differ(size, dtype)
        self._stream.run(lambda: kernel(*flat, results))
        worst, largest = results.numpy().max(axis=1)
        return float(worst), float(largest)

    @functools.cache  # noqa: B019  (as long as the process)
    def _differ(self, size: int, dtype: str) -> Kernel:
        func = templates.extern_kernel(
            [Param("a", (size,), dtype), Param("b", (size,), dtype), Param("found", (2, DIFFER_BLOCKS), "float32")],
            (DIFFER_BLOCKS,),
            DIFFER_THREADS,
            f"tb::differ<{DTYPES[dtype].cuda}, {size}, {DIFFER_THREADS}>",
            ["a", "b", "found"],
        )
        with nvrtc.compiling(self._folder):
            return tvm.compile(tvm.IRModule({"main": func}), target=self._target)["main"]

    def survive(self, error: Exception) -> None:
        """Fails, and so ends the process, where the GPU's state is lost."""
        self._stream.wait()
