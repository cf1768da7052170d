"""The one measuring loop: input sets of a kernel on a device, outputs compared with the default's, times taken.

Runners differ in how they allocate, launch and read a clock, which is what `Primitives` are. All else is the same
for a CPU, CUDA, GPU APIs and devices over RPC: inputs, cold caches, tolerances, how many calls make a sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import s_tir

from tunebench.compile import in_float64
from tunebench.dtypes import numpy_dtype
from tunebench.runners.base import MeasureInput, Outcome, Timed, Wrong
from tunebench.timing import Protocol, Samples, interleave

Buffer = Any
"""Memory of a device, as its runner has it."""
Kernel = Any
"""A kernel that can be launched, as its runner has it."""
Sampler = Callable[[int], int]
"""Runs a kernel so many times, each on the next input set; nanoseconds of one call."""

MOST_SETS = 32
CHECKED_AT_ONCE = 1 << 15  # elements, which stay in a core's cache
POOL = 1_048_573  # random values of a large input, a prime
MOST_CALLS = 256  # of a sample
LONG_NS = 2_000_000  # a call that fills the caches and more
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 1e-2, "int32": 1e-2}
TOLERANCE |= {"uint8": 1e-2, "uint32": 1e-2}  # codes of a quantized cache
"""Of the largest reference value; quantized activations may differ by one step."""
SMALL = np.float32(2.0**-15)


@dataclass(frozen=True)
class Rules:
    """How a device is measured, beyond the protocol."""

    whole_rounds: bool = False  # whatever the protocol says, as all calls of a sample are submitted at once
    launch_ns: int = 0  # that a single call may take beyond its kernel
    kept_bytes: int = 256 << 20  # input sets of kernels that were measured before, as long as they fit in this
    set_bytes: int = 1 << 62  # all input sets of one kernel


class Rotation:
    """Input sets in turn. All kernels that are timed over them share the turn, so that none finds another's set."""

    def __init__(self, sets: Sequence[Sequence[Buffer]]) -> None:
        self.sets = sets
        self._turn = 0

    def next(self) -> Sequence[Buffer]:
        """The set of the next call."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self.sets[self._turn]


class Primitives(ABC):
    """What a device must do to be measured on."""

    rules = Rules()

    @abstractmethod
    def allocate(self, array: np.ndarray) -> Buffer:
        """New memory with an array's contents."""

    @abstractmethod
    def duplicate(self, buffer: Buffer) -> Buffer:
        """New memory with a buffer's contents."""

    @abstractmethod
    def restore(self, to: Buffer, source: Buffer) -> None:
        """Copy a buffer's contents to another of its size, before what is launched next."""

    @abstractmethod
    def read(self, buffer: Buffer) -> np.ndarray:
        """A buffer's contents, of its element type and any shape, once what was launched is done."""

    @abstractmethod
    def load(self, built: Any) -> Kernel:
        """A kernel ready to launch, from a module as JSON or from what was built of it; raises where it is broken."""

    @abstractmethod
    def run(self, kernel: Kernel, buffers: Sequence[Buffer]) -> None:
        """Launch once; `read` and `distance` wait."""

    @abstractmethod
    def sampler(self, kernel: Kernel, rotation: Rotation) -> Sampler:
        """Times the kernel over input sets, in turn."""

    def open(self) -> None:  # noqa: B027  (TVM's devices of a CPU are always open)
        """Begin to measure in this process; TuneBenchError where there is no such device."""

    def build(self, mod_json: str) -> None:
        """Compile a kernel as far as that goes in a process that does not measure."""
        raise NotImplementedError

    def keep(self, buffer: Buffer) -> Any:
        """A copy to compare other outputs with."""
        return self.read(buffer)

    def distance(self, found: Buffer, kept: Any) -> tuple[float, float]:
        """The largest difference, not finite where there is a NaN, and the largest kept value."""
        return distance(self.read(found), kept)

    def remember(self, name: str, compute: Callable[[], dict[int, Any]]) -> dict[int, Any]:
        """What `compute` returns, or what it returned elsewhere for the same kernel."""
        return compute()

    def survive(self, error: Exception) -> None:  # noqa: B027  (a CPU has no state to lose)
        """After an error of a candidate; raises where the process cannot go on."""


class Bench:
    """Input sets of one kernel on a device, and its reference outputs.

    Sets have inputs of their own, so that caches are cold, and share the output: launches that write the same memory
    wait for each other, as those of a decode step do.
    """

    def __init__(self, device: Primitives, given: MeasureInput, reference: Any) -> None:
        mod = tvm.ir.load_json(given.reference)
        arrays = random_inputs(mod, given.depth, np.random.default_rng(0))
        self._device, self._output = device, len(arrays) - 1
        self._dtypes = {i: _compared_as(arrays, i) for i in written(mod)}
        first = [device.allocate(array) for array in arrays]
        count = _count(mod["main"].params, given, device.rules.set_bytes)
        self._rotation = Rotation([first] + [self._another(first) for _ in range(count - 1)])
        self._found = {i: device.duplicate(first[i]) for i in self._dtypes}
        self._before = {i: device.duplicate(first[i]) for i in self._dtypes if i != self._output}
        garbage = np.full(arrays[-1].nbytes, 0xFF, np.uint8).view(arrays[-1].dtype)  # NaN in every float type
        self._before[self._output] = device.allocate(garbage.reshape(arrays[-1].shape))
        self.held_bytes = count * sum(map(_bytes, mod["main"].params))
        self.default = device.load(reference)
        if given.exact:
            self._expected = self._exact_outputs(given.exact, arrays)
        else:
            self._expected = device.remember(given.name, self._reference_outputs)

    def _another(self, first: Sequence[Buffer]) -> list[Buffer]:
        return [b if i == self._output else self._device.duplicate(b) for i, b in enumerate(first)]

    def _reference_outputs(self) -> dict[int, Any]:
        self._run(self.default)
        return {i: self._device.keep(buffer) for i, buffer in self._found.items()}

    def _exact_outputs(self, mod_json: str, arrays: Sequence[np.ndarray]) -> dict[int, Any]:
        exact = in_float64.outputs(tvm.ir.load_json(mod_json), arrays)
        rounded = {i: exact[i].astype(arrays[i].dtype) for i in self._dtypes}
        return {i: self._device.keep(self._device.allocate(array)) for i, array in rounded.items()}

    def _run(self, kernel: Kernel) -> None:
        """Run once into `_found`, whose output starts as garbage, so that what is not written shows."""
        for i, buffer in self._found.items():
            self._device.restore(buffer, self._before[i])
        self._device.run(kernel, [self._found.get(i, buffer) for i, buffer in enumerate(self._rotation.sets[0])])

    def check(self, kernel: Kernel) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        self._run(kernel)
        for i, buffer in self._found.items():
            wrong = too_far(*self._device.distance(buffer, self._expected[i]), self._dtypes[i])
            if wrong:
                return wrong
        return ""

    def check_and_time(self, kernel: Kernel, protocol: Protocol, limit_ns: int) -> Outcome:
        """Check, then time; one call only if that takes over `limit_ns`."""
        wrong = self.check(kernel)
        if wrong:
            return Wrong(wrong)
        first = self._device.sampler(kernel, self._rotation)(1)
        if first > limit_ns + self._device.rules.launch_ns:
            return Timed((first,))
        return self.time({"it": kernel}, protocol)["it"]

    def time(self, kernels: Mapping[str, Kernel], protocol: Protocol) -> dict[str, Timed]:
        """Times of kernels, interleaved."""
        arms = {name: self._device.sampler(kernel, self._rotation) for name, kernel in kernels.items()}

        def calls(sampler: Sampler, warmup_ns: list[int]) -> int:
            return self._calls(sampler, warmup_ns, protocol)

        taken: dict[str, Samples] = interleave(arms, protocol, take=lambda sampler, n: sampler(n), calls=calls)
        return {name: Timed(tuple(samples.samples_ns)) for name, samples in taken.items()}

    def _calls(self, sampler: Sampler, warmup_ns: list[int], protocol: Protocol) -> int:
        """How many calls a sample is the mean of; one such sample is a warm-up, too."""
        whole_rounds = protocol.whole_rounds or self._device.rules.whole_rounds
        if not (warmup_ns or whole_rounds):
            return 1
        once_ns = max(1, min(warmup_ns) if warmup_ns else sampler(1))
        least = len(self._rotation.sets) if whole_rounds and once_ns <= LONG_NS else 1
        calls = min(MOST_CALLS, max(least, round(protocol.sample_s * 1e9 / once_ns)))
        if calls > 1:
            sampler(calls)
        return calls


def count_sets(given: MeasureInput, most_bytes: int) -> int:
    """How many input sets of a kernel are larger than the caches together, within `most_bytes`."""
    return _count(tvm.ir.load_json(given.reference)["main"].params, given, most_bytes)


def _count(params: Sequence[tvm.tirx.Buffer], given: MeasureInput, most_bytes: int) -> int:
    touched = sum(_bytes(param) * _touched(param, given.depth) for param in params)
    return max(1, min(MOST_SETS, math.ceil(given.cold_bytes / touched), most_bytes // sum(map(_bytes, params))))


def held_bytes(given: MeasureInput, most_bytes: int) -> int:
    """What the input sets of a kernel take."""
    params = tvm.ir.load_json(given.reference)["main"].params
    return _count(params, given, most_bytes) * sum(map(_bytes, params))


def _bytes(param: tvm.tirx.Buffer) -> int:
    return math.prod(_shape(param)) * numpy_dtype(str(param.dtype)).itemsize


def _shape(param: tvm.tirx.Buffer) -> tuple[int, ...]:
    return tuple(int(extent) for extent in param.shape)


def _touched(param: tvm.tirx.Buffer, depth: int) -> float:
    """The part of an argument that a call reads or writes: of a cache, the positions up to the depth."""
    return min(1.0, (depth + 1) / _shape(param)[2]) if param.name in ("keys", "values") else 1.0


def random_inputs(mod: tvm.IRModule, depth: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random arguments of a kernel."""
    return random_arrays(mod["main"].params, depth, rng)


def random_arrays(params: Sequence[tvm.tirx.Buffer], depth: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random values for parameters."""
    arrays = [_input(param, depth, rng) for param in params]
    if any(array.dtype == np.int8 for array in arrays):  # products of integers are large, their scales small
        arrays = [array * SMALL if array.dtype == np.float32 else array for array in arrays]
    return arrays


def _input(param: tvm.tirx.Buffer, depth: int, rng: np.random.Generator) -> np.ndarray:
    """Random values; a vector of int32 is an index, which must be in range: the depth, or 0."""
    shape, dtype = _shape(param), str(param.dtype)
    if dtype == "int8" or (dtype == "int32" and len(shape) > 1):
        return rng.integers(-127, 127, shape, dtype, endpoint=True)
    if dtype == "int32":
        return np.full(shape, depth if param.name == "position" else 0, np.int32)
    if dtype.startswith("uint"):
        words = rng.integers(0, np.iinfo(dtype).max, min(POOL, math.prod(shape)), dtype, endpoint=True)
        return np.resize(words, shape)
    # large ones repeat: billions of draws take longer than the kernel's trials, and a prime shifts every row
    values = rng.uniform(-1, 1, min(POOL, math.prod(shape))).astype(np.float32).astype(numpy_dtype(dtype))
    return np.resize(values, shape)


def written(mod: tvm.IRModule) -> list[int]:
    """Which of a kernel's arguments it writes, by place."""
    sch = s_tir.Schedule(mod)
    names: set[str] = set()
    blocks = [sch.get_sblock("root")]
    while blocks:
        block = blocks.pop()
        names.update(region.source.name for region in sch.get(block).writes)
        blocks += sch.get_child_blocks(block)
    return [i for i, param in enumerate(mod["main"].params) if param.name in names]


def _compared_as(arrays: Sequence[np.ndarray], i: int) -> str:
    """An output's element type; what is made of float16 may have been rounded to it on the way to float32."""
    dtype = str(arrays[i].dtype)
    return "float16" if dtype == "float32" and any(array.dtype == np.float16 for array in arrays) else dtype


def distance(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest difference, not finite where there is a NaN, and the largest expected value."""
    found, expected = found.reshape(-1), expected.reshape(-1)
    worst, largest = [], []
    for at in range(0, found.size, CHECKED_AT_ONCE):
        part = expected[at : at + CHECKED_AT_ONCE].astype(np.float32)
        largest.append(np.abs(part).max())
        part -= found[at : at + CHECKED_AT_ONCE].astype(np.float32)
        worst.append(np.abs(part, out=part).max())
    return float(np.max(worst)), float(np.max(largest))


def too_far(worst: float, largest: float, dtype: str) -> str:
    """Why outputs that are off by `worst` at most, where the largest is `largest`, are wrong; or an empty string."""
    bound = TOLERANCE[dtype] * max(largest, 1e-6)
    if not (worst <= bound and math.isfinite(worst)):  # NaN is not below anything
        return f"wrong output: off by {worst:.3g} where {bound:.3g} is allowed"
    return ""
