"""A trial is one candidate kernel built, checked and timed: what all runners share, and their interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

import numpy as np
import tvm
from tvm import s_tir

from tunebench.dtypes import numpy_dtype
from tunebench.timing import Protocol

BUILD_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0
CHECKED_AT_ONCE = 1 << 15  # elements, which stay in a core's cache
POOL = 1_048_573  # random values of a large input, a prime
LOST = "lost when its worker stopped"
REFERENCE_ONLY = Protocol(warmups=0, samples=1, least_samples=1)
MAX_SETS = 32
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 1e-2, "int32": 1e-2}
"""Of the largest reference value; quantized activations may differ by one step."""
SMALL = np.float32(2.0**-15)


@dataclass(frozen=True)
class Job:
    """A kernel to compare candidates of: its module with the default schedule, and what its inputs are."""

    name: str
    reference: str  # the module with its default schedule, as JSON
    depth: int  # value of a `position` input
    cold_bytes: int  # input sets are rotated until they add up to this


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate. `samples_ns` is empty where `error` says why."""

    samples_ns: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Trial:
    """What candidates are built for: how they will be timed, for runners that begin as soon as one is built."""

    job: Job
    protocol: Protocol
    limit_ns: int


class Runner(Interface):
    """Builds, checks and times candidates of kernels. Close it when done."""

    builds_ahead: bool
    """Whether `build` returns at once, and candidates of one round may be built while another's are measured."""

    queued_s: float
    """How long callers have waited until a device was free."""

    def close(self) -> None: ...

    def prepare(self, job: Job, protocol: Protocol) -> Outcome:
        """Run the default schedule: its times, and the outputs that candidates are compared with."""
        ...

    def build(self, candidates: Sequence[tuple[str, tvm.IRModule]], trial: Trial | None = None) -> dict[str, str]:
        """Compile candidates, or begin to; the errors that are known already, by name."""
        ...

    def time(self, job: Job, name: str, protocol: Protocol, limit_ns: int) -> Outcome:
        """Check a built candidate against the reference, then time it; one call only if that takes over `limit_ns`."""
        ...

    def duel(
        self, job: Job, candidates: Sequence[tuple[str, tvm.IRModule]], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates, interleaved with each other and the default (named `default`)."""
        ...

    def forget(self) -> None:
        """Drop compiled candidates."""
        ...


def compiled(mod_json: str, target: tvm.target.Target) -> Callable[..., object]:
    """A kernel's module, as JSON, as something to call."""
    kernel: Callable[..., object] = tvm.compile(tvm.ir.load_json(mod_json), target=target)["main"]
    return kernel


def inputs(mod: tvm.IRModule, depth: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random arguments of a kernel."""
    arrays = [_input(param, depth, rng) for param in mod["main"].params]
    if any(array.dtype == np.int8 for array in arrays):  # products of integers are large, their scales small
        arrays = [array * SMALL if array.dtype == np.float32 else array for array in arrays]
    return arrays


def sets_of(job: Job, params: Sequence[tvm.tirx.Buffer], arrays: Sequence[np.ndarray]) -> int:
    """How many input sets are larger than the caches together."""
    touched = sum(_touched_bytes(param, array, job.depth) for param, array in zip(params, arrays, strict=True))
    return max(1, min(MAX_SETS, math.ceil(job.cold_bytes / touched)))


def _touched_bytes(param: tvm.tirx.Buffer, array: np.ndarray, depth: int) -> float:
    """What a call reads or writes of an argument: of a cache, the positions up to the depth."""
    if param.name in ("keys", "values"):
        return float(array.nbytes * min(1.0, (depth + 1) / array.shape[2]))
    return float(array.nbytes)


def mismatch(array: np.ndarray, expected: np.ndarray, half: bool = False) -> str:
    """Why an output is wrong, or an empty string. `expected` has the same bits per element.

    `half` inputs: what is made of float16 may have been rounded to it on the way to a float32 output.
    """
    dtype = "float16" if half and array.dtype == np.float32 else str(array.dtype)
    found, want = array.reshape(-1), expected.view(array.dtype).reshape(-1)
    worst, largest = [], []
    for at in range(0, found.size, CHECKED_AT_ONCE):
        part = want[at : at + CHECKED_AT_ONCE].astype(np.float32)
        largest.append(np.abs(part).max())
        part -= found[at : at + CHECKED_AT_ONCE].astype(np.float32)
        worst.append(np.abs(part, out=part).max())
    return too_far(float(np.max(worst)), float(np.max(largest)), dtype)


def too_far(worst: float, largest: float, dtype: str) -> str:
    """Why outputs that are off by `worst` at most, where the largest is `largest`, are wrong; or an empty string."""
    bound = TOLERANCE[dtype] * max(largest, 1e-6)
    if not (worst <= bound and math.isfinite(worst)):  # NaN is not below anything
        return f"wrong output: off by {worst:.3g} where {bound:.3g} is allowed"
    return ""


def bits(array: np.ndarray) -> np.dtype:
    """The unsigned type of an array's elements' size, which every file format knows."""
    return np.dtype(f"u{array.dtype.itemsize}")


def _input(param: tvm.tirx.Buffer, depth: int, rng: np.random.Generator) -> np.ndarray:
    """Random values; a vector of int32 is an index, which must be in range: the depth, or 0."""
    shape = tuple(int(extent) for extent in param.shape)
    dtype = str(param.dtype)
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
