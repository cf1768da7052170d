"""Candidates as source text on a GPU API: built to a program, checked and timed as the API can."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tvm

from tunebench.compile import source
from tunebench.errors import TuneBenchError
from tunebench.runners.base import Job, inputs, mismatch, sets_of, written
from tunebench.runners.gpu import calls_of_a_sample
from tunebench.runtime import apis
from tunebench.runtime.apis import ApiDevice, Buffer, Call
from tunebench.runtime.plan import Program

MOST_BYTES = 4 << 30  # of all inputs, where an API does not say what a device has


class SourceWay:
    """How the worker processes of one API's runner build and measure."""

    def __init__(self, api: str) -> None:
        self._api = api
        self._target: tvm.target.Target = None
        self._folder = Path()
        self._device: ApiDevice | None = None

    def start_builder(self, target: str, folder: str) -> None:
        """Keep the target and the folder."""
        os.environ.setdefault("__GL_SHADER_DISK_CACHE", "1")  # which NVIDIA's driver leaves out for root
        self._target, self._folder = tvm.ir.load_json(target), Path(folder)

    def build(self, mod_json: str) -> None:
        """Generate the program and leave it in the folder, and its machine code in the driver's cache."""
        path, program = self._path(mod_json), source.program(tvm.ir.load_json(mod_json), self._target)
        with contextlib.suppress(TuneBenchError, RuntimeError):  # the process that measures will say why
            device = apis.open_device(self._api)
            for shader in program.shaders.values():
                device.compile(shader)
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            pickle.dump(program, file)
        os.replace(file.name, path)

    def program(self, mod_json: str) -> Program:
        """A kernel's program: a builder's, or generated now."""
        path = self._path(mod_json)
        if not path.exists():
            self.build(mod_json)
        program: Program = pickle.loads(path.read_bytes())
        return program

    def _path(self, mod_json: str) -> Path:
        return self._folder / f"{hashlib.sha1(mod_json.encode()).hexdigest()}.program"

    def start_measuring(self, target: str, folder: str) -> None:
        """As a builder, with the device open."""
        self.start_builder(target, folder)
        self._device = apis.open_device(self._api)

    def most_bytes(self) -> int:
        """A quarter of the device's memory."""
        return (self.device.free_bytes or 4 * MOST_BYTES) // 4

    def wait(self) -> None:
        """Until the device is done."""
        self.device.wait()

    @property
    def device(self) -> ApiDevice:
        """The device of the process that measures."""
        if self._device is None:
            raise RuntimeError("a builder has no device")
        return self._device

    def new_bench(self, job: Job) -> SourceBench:
        """The inputs of a job."""
        return SourceBench(self, job)


class SourceKernel:
    """A compiled program with its scratch memory."""

    def __init__(self, device: ApiDevice, program: Program) -> None:
        self._launches = program.launches
        self._compiled = {name: device.compile(shader) for name, shader in program.shaders.items()}
        self._scratch = [device.allocate(size) for size in program.scratch_bytes]

    def calls(self, buffers: Sequence[Buffer]) -> list[Call]:
        """Its launches over a kernel's parameters."""
        every = [*buffers, *self._scratch]
        return [
            Call(self._compiled[each.shader], [every[i] for i in each.buffers], each.blocks) for each in self._launches
        ]


class SourceBench:
    """Input sets of one job on a device and its reference outputs.

    Sets share what the kernel writes: launches that write the same memory wait for each other, as those of a
    decode step do.
    """

    def __init__(self, way: SourceWay, job: Job) -> None:
        self._way, self._device = way, way.device
        reference = tvm.ir.load_json(job.reference)
        self.arrays = inputs(reference, job.depth, np.random.default_rng(0))
        self.half = any(array.dtype == np.float16 for array in self.arrays)
        self.written = written(reference)
        count = sets_of(job, reference["main"].params, self.arrays)
        first = [self._new(array) for array in self.arrays]
        self.sets = [first] + [self._another(first) for _ in range(count - 1)]
        self.turn = 0
        rest = sum(array.nbytes for i, array in enumerate(self.arrays) if i not in self.written)
        self.held_bytes = sum(array.nbytes for array in self.arrays) + (count - 1) * rest
        self.default = self.load(job.reference)
        self.expected = self._outputs(self.default)

    def _new(self, array: np.ndarray) -> Buffer:
        buffer = self._device.allocate(array.nbytes)
        self._device.write(buffer, array)
        return buffer

    def _another(self, first: Sequence[Buffer]) -> list[Buffer]:
        """A set with the same contents."""
        buffers = list(first)
        for i, array in enumerate(self.arrays):
            if i not in self.written:
                buffers[i] = self._device.allocate(array.nbytes)
                self._device.copy(buffers[i], first[i], array.nbytes)
        return buffers

    def load(self, mod_json: str) -> SourceKernel:
        """A kernel ready to run."""
        return SourceKernel(self._device, self._way.program(mod_json))

    def _outputs(self, kernel: SourceKernel) -> dict[int, np.ndarray]:
        """Run once; what the kernel writes, where its output was NaN before, so that gaps show."""
        output = len(self.arrays) - 1
        for i in self.written:
            start = np.full(self.arrays[i].nbytes, 0xFF, np.uint8) if i == output else self.arrays[i]
            self._device.write(self.sets[0][i], start)
        self._device.record(kernel.calls(self.sets[0])).run()
        found = {}
        for i in self.written:
            array = self.arrays[i]
            found[i] = self._device.read(self.sets[0][i], array.nbytes).view(array.dtype).reshape(array.shape)
        return found

    def check(self, kernel: SourceKernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        for i, array in self._outputs(kernel).items():
            wrong = mismatch(array, self.expected[i], self.half)
            if wrong:
                return wrong
        return ""

    def once_ns(self, kernel: SourceKernel) -> float:
        """One call on the next input set."""
        self.turn = (self.turn + 1) % len(self.sets)
        return self._device.record(kernel.calls(self.sets[self.turn])).elapsed_ns()

    def arm(self, kernel: SourceKernel) -> Callable[[], int]:
        """A sample: nanoseconds of a call among many."""
        calls = calls_of_a_sample(self.once_ns(kernel), len(self.sets))
        sets = self.sets if calls >= len(self.sets) else self.sets[:calls]
        rounds = calls // len(sets)
        every = [call for buffers in sets for call in kernel.calls(buffers)]
        recording = self._device.record(every, rounds)
        return lambda: round(recording.elapsed_ns() / (rounds * len(sets)))
