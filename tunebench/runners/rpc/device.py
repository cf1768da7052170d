"""A process with a session on one device over RPC: its inputs, checks and times.

A message takes longer than many a kernel, so the device times calls itself, through `step` of `rpc_library`. Inputs go
to it once a session and job, and are copied there; outputs come back to be compared. A session that answers no more is
`Lost`, whatever the error said; any other error is the candidate's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import rpc

from tunebench.errors import brief
from tunebench.runners.base import Job, Outcome, inputs, mismatch, written
from tunebench.runners.rpc.library import HELD_BYTES, PROBE_SIZE
from tunebench.timing import Protocol, Samples, interleave

PROBE_SAMPLES, PROBE_CALLS = 7, 20
CACHES = "/sys/devices/system/cpu/cpu0/cache/index{index}/size"
MOST_CACHES = 6
BIG_CORES = 1  # of the thread pool: prefer those

Facts = dict[str, Any]
"""What a device says of itself: cpu, triple, threads, form, cache_bytes; empty or 0 where it does not say."""


class Lost(Exception):
    """The session is gone, with whatever it was doing."""


class _State:
    """The state of this process."""

    session: rpc.RPCSession
    benches: dict[str, _Bench]
    files = 0


_state = _State()


def connect(host: str, port: int, match_key: str, lifetime_s: float, threads: int) -> bool:
    """Begin a session, in place of the last."""
    disconnect()
    _state.session = rpc.connect(host, port, match_key, lifetime_s)
    if threads:
        _remote("runtime.config_threadpool")(BIG_CORES, threads)
    return True


def describe() -> Facts:
    """What the device says of itself."""
    return {
        "cpu": str(_told("target.llvm_get_system_cpu", "")),
        "triple": str(_told("target.llvm_get_system_triple", "")),
        "threads": int(str(_told("runtime.NumThreads", 0))),
        "form": "ll" if _has("ffi.Module.load_from_file.ll") else "o",
        "cache_bytes": _cache_bytes(),
    }


def disconnect() -> bool:
    """End the session: the server is free for the next client."""
    _state.benches = {}
    if hasattr(_state, "session"):
        del _state.session
    return True


def probe(library: Path) -> float:
    """Nanoseconds of a fixed kernel."""
    with _watching():
        module = _load(library)
        shape = (PROBE_SIZE, PROBE_SIZE)
        tensors = [_tensor(np.zeros(shape, np.float32)) for _ in range(3)]
        timer = module.time_evaluator("main", _cpu(), number=PROBE_CALLS, repeat=PROBE_SAMPLES)
        return 1e9 * min(_sane(seconds) for seconds in timer(*tensors).results)


def set_up(job: Job, reference: Path, sets: int) -> bool:
    """Have the job's inputs on the device, and the outputs of its default schedule."""
    with _watching():
        bench = _state.benches.pop(job.name, None)
        size = bench.held_bytes if bench else _bytes(job) * sets
        while _state.benches and size + sum(each.held_bytes for each in _state.benches.values()) > HELD_BYTES:
            _state.benches.pop(next(iter(_state.benches)))  # the one used longest ago
        _state.benches[job.name] = bench or _Bench(job, reference, sets)
    return True


def prepare(job: Job, protocol: Protocol) -> Outcome:
    """Time the default schedule."""
    bench = _state.benches[job.name]
    with _watching():
        return _outcome(interleave({"default": bench.arm(bench.default)}, protocol, take=_take)["default"])


def check_and_time(job: Job, library: Path, protocol: Protocol, limit_ns: int) -> Outcome:
    """Check a candidate, then time it; one call only if that takes over `limit_ns`."""
    bench = _state.benches[job.name]
    try:
        with _watching():
            kernel = _load(library)
            wrong = bench.check(kernel)
            if wrong:
                return Outcome(error=wrong)
            arm = bench.arm(kernel)
            first = arm(1)
            if first > limit_ns:
                return Outcome((first,))
            return _outcome(interleave({"it": arm}, protocol, take=_take)["it"])
    except Lost:
        raise
    except Exception as error:  # whatever the candidate raises, on the device or on loading
        return Outcome(error=brief(error))


def duel(job: Job, libraries: dict[str, Path], protocol: Protocol, with_default: bool) -> dict[str, Outcome]:
    """Check and time several candidates on this device, interleaved."""
    bench = _state.benches[job.name]
    outcomes: dict[str, Outcome] = {}
    arms = {"default": bench.arm(bench.default)} if with_default else {}
    for name, library in libraries.items():
        try:
            with _watching():
                kernel = _load(library)
                wrong = bench.check(kernel)
        except Lost:
            raise
        except Exception as error:  # whatever the candidate raises
            wrong = brief(error)
        if wrong:
            outcomes[name] = Outcome(error=wrong)
        else:
            arms[name] = bench.arm(kernel)
    with _watching():
        taken = interleave(arms, protocol, take=_take)
    return {**outcomes, **{name: _outcome(samples) for name, samples in taken.items()}}


class _Bench:
    """Input sets of one job on the device, and its reference outputs here."""

    def __init__(self, job: Job, reference: Path, sets: int) -> None:
        mod = tvm.ir.load_json(job.reference)
        arrays = inputs(mod, job.depth, np.random.default_rng(0))
        self.half = any(array.dtype == np.float16 for array in arrays)
        first = [_tensor(array) for array in arrays]
        self.sets = [first] + [[_copy(tensor) for tensor in first] for _ in range(sets - 1)]
        self.turn = _tensor(np.zeros(1, np.int32))
        self.written = written(mod)
        self.before = {i: _copy(first[i]) for i in self.written}
        self.found = {i: _copy(first[i]) for i in self.written}
        last = len(arrays) - 1
        if last in self.before:  # garbage, NaN in every float type: what is not written shows
            garbage = np.full(arrays[last].nbytes, 0xFF, np.uint8).view(arrays[last].dtype).reshape(arrays[last].shape)
            self.before[last] = _tensor(garbage)
        self.held_bytes = sum(array.nbytes for array in arrays) * sets
        self.default = _load(reference)
        self.expected = self._outputs(self.default)

    def _outputs(self, kernel: tvm.runtime.Module) -> dict[int, np.ndarray]:
        for i, tensor in self.found.items():
            self.before[i].copyto(tensor)
        kernel["main"](*(self.found.get(i, tensor) for i, tensor in enumerate(self.sets[0])))
        return {i: tensor.numpy() for i, tensor in self.found.items()}

    def check(self, kernel: tvm.runtime.Module) -> str:
        """Why the kernel's outputs are wrong, or an empty string."""
        for i, array in self._outputs(kernel).items():
            wrong = mismatch(array, self.expected[i], self.half)
            if wrong:
                return wrong
        return ""

    def arm(self, kernel: tvm.runtime.Module) -> Callable[..., int]:
        """Nanoseconds of a call, of so many, each on the next input set."""
        arguments = [self.turn, *(tensor for each in self.sets for tensor in each)]

        def sample(calls: int) -> int:
            timer = kernel.time_evaluator("step", _cpu(), number=calls)
            return max(1, round(1e9 * _sane(timer(*arguments).results[0])))

        return sample


@contextmanager
def _watching() -> Iterator[None]:
    """An error becomes `Lost` where the session does not answer any more."""
    try:
        yield
    except Exception as error:
        try:
            _remote("runtime.NumThreads")()
        except Exception:
            raise Lost(brief(error)) from None
        raise


def _take(call: Callable[..., int], calls: int) -> int:
    return call(calls)


def _sane(seconds: float) -> float:
    """A time that a clock can have measured; ValueError for any other."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"the device returned a time of {seconds} s")
    return seconds


def _outcome(samples: Samples) -> Outcome:
    return Outcome(tuple(samples.samples_ns))


def _load(library: Path) -> tvm.runtime.Module:
    """Upload a library and load it; its file does not stay."""
    _state.files += 1
    name = f"{_state.files}{library.suffix}"
    _state.session.upload(bytearray(library.read_bytes()), name)
    try:
        return _state.session.load_module(name)
    finally:
        _state.session.remove(name)


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array, _cpu())


def _copy(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    """On the device."""
    return tensor.copyto(tvm.runtime.empty(tensor.shape, tensor.dtype, _cpu()))


def _cpu() -> tvm.runtime.Device:
    return _state.session.cpu()


def _bytes(job: Job) -> int:
    params = tvm.ir.load_json(job.reference)["main"].params
    return sum(math.prod(map(int, p.shape)) * ((tvm.DataType(p.dtype).bits + 7) // 8) for p in params)


def _remote(name: str) -> Callable[..., object]:
    function: Callable[..., object] = _state.session.get_function(name)
    return function


def _has(name: str) -> bool:
    try:
        _remote(name)
    except AttributeError:
        return False
    return True


def _told(name: str, otherwise: object) -> object:
    """What a function without arguments returns, where the server has it."""
    return _remote(name)() if _has(name) else otherwise


def _cache_bytes() -> int:
    """The largest cache of the first core, by Linux; 0 where it does not say."""
    sizes = [0]
    for index in range(MOST_CACHES):
        try:
            size = bytes(_state.session.download(CACHES.format(index=index))).strip(b"\0\n ")
        except Exception:  # no such file, or no such system
            break
        if size.endswith(b"K") and size[:-1].isdigit():
            sizes.append(int(size[:-1]) << 10)
    return max(sizes)
