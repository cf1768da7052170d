"""Kernels as source text on a GPU API: built to a program, launched and timed as the API can."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tvm

from tunebench.compile import source
from tunebench.errors import TuneBenchError
from tunebench.runners.bench import Primitives, Rotation, Rules, Sampler
from tunebench.runners.gpu import RULES
from tunebench.runtime import apis
from tunebench.runtime.apis import ApiDevice, Buffer, Call, Recording
from tunebench.runtime.plan import Program

MOST_BYTES = 4 << 30  # of all inputs, where an API does not say what a device has


@dataclass(frozen=True)
class Array:
    """Device memory and what it holds."""

    buffer: Buffer
    size_bytes: int
    dtype: np.dtype


class LoadedProgram:
    """A compiled program with its scratch memory."""

    def __init__(self, device: ApiDevice, program: Program) -> None:
        self._launches = program.launches
        self._compiled = {name: device.compile(shader) for name, shader in program.shaders.items()}
        self._scratch = [device.allocate(size) for size in program.scratch_bytes]

    def calls(self, arrays: Sequence[Array]) -> list[Call]:
        """Its launches over a kernel's parameters."""
        every = [*(array.buffer for array in arrays), *self._scratch]
        return [
            Call(self._compiled[each.shader], [every[i] for i in each.buffers], each.blocks) for each in self._launches
        ]


class ShaderPrimitives(Primitives):
    """The first device of a GPU API, in whichever process."""

    def __init__(self, api: str, target: str, folder: str) -> None:
        os.environ.setdefault("__GL_SHADER_DISK_CACHE", "1")  # which NVIDIA's driver leaves out for root
        self._api, self._target, self._folder = api, tvm.ir.load_json(target), Path(folder)

    @functools.cached_property
    def _device(self) -> ApiDevice:
        return apis.open_device(self._api)

    @functools.cached_property
    def rules(self) -> Rules:  # type: ignore[override]
        """A quarter of the device's memory is for input sets."""
        return replace(RULES, kept_bytes=(self._device.free_bytes or 4 * MOST_BYTES) // 4)

    def open(self) -> None:
        """The API's device."""
        self._device.wait()

    def build(self, mod_json: str) -> None:
        """Generate the program and leave it in the folder, and its machine code in the driver's cache."""
        path, program = self._path(mod_json), source.program(tvm.ir.load_json(mod_json), self._target)
        with contextlib.suppress(TuneBenchError, RuntimeError):  # the process that measures will say why
            for shader in program.shaders.values():
                self._device.compile(shader)
        with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            pickle.dump(program, file)
        os.replace(file.name, path)

    def _path(self, mod_json: str) -> Path:
        return self._folder / f"{hashlib.sha1(mod_json.encode()).hexdigest()}.program"

    def load(self, built: str) -> LoadedProgram:
        """A builder's program, or one generated now."""
        path = self._path(built)
        if not path.exists():
            self.build(built)
        program: Program = pickle.loads(path.read_bytes())
        return LoadedProgram(self._device, program)

    def allocate(self, array: np.ndarray) -> Array:
        """A buffer of the API."""
        made = Array(self._device.allocate(array.nbytes), array.nbytes, array.dtype)
        self._device.write(made.buffer, array)
        return made

    def duplicate(self, buffer: Array) -> Array:
        """Another buffer."""
        made = replace(buffer, buffer=self._device.allocate(buffer.size_bytes))
        self.restore(made, buffer)
        return made

    def restore(self, to: Array, source: Array) -> None:
        """On the device."""
        self._device.copy(to.buffer, source.buffer, to.size_bytes)

    def read(self, buffer: Array) -> np.ndarray:
        """Once all that was submitted is done."""
        return self._device.read(buffer.buffer, buffer.size_bytes).view(buffer.dtype)

    def run(self, kernel: LoadedProgram, buffers: Sequence[Array]) -> None:
        """Its launches, in order."""
        self._device.record(kernel.calls(buffers)).run()

    def sampler(self, kernel: LoadedProgram, rotation: Rotation) -> Sampler:
        """A recording of whole rounds over the input sets."""
        recorded: dict[int, Recording] = {}

        def sample(calls: int) -> int:
            if calls == 1:
                return self._device.record(kernel.calls(rotation.next())).elapsed_ns()
            used = rotation.sets[: min(calls, len(rotation.sets))]
            rounds = calls // len(used)
            if calls not in recorded:
                every = [call for arrays in used for call in kernel.calls(arrays)]
                recorded[calls] = self._device.record(every, rounds)
            return round(recorded[calls].elapsed_ns() / (rounds * len(used)))

        return sample

    def survive(self, error: Exception) -> None:
        """Fails where the device does not go on."""
        self._device.wait()
