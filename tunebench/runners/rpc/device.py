"""A process with a session on one device over RPC.

A message takes longer than many a kernel, so the device times calls itself, through `step` of `library`. Inputs go
to it once a session and kernel, and are copied there; outputs come back to be compared. A session that answers no more
is `Lost`, whatever the error said; any other error is the candidate's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm import rpc

from tunebench.errors import brief
from tunebench.runners import worker
from tunebench.runners.base import MeasureInput
from tunebench.runners.bench import Buffer, Kernel, Primitives, Rotation, Rules, Sampler
from tunebench.runners.rpc.library import HELD_BYTES, PROBE_SIZE

MOST_SECONDS = 1e5  # of a call
MOST_THREADS = 4096
MOST_CACHE_BYTES = 1 << 31
PROBE_SAMPLES, PROBE_CALLS = 7, 20
CACHES = "/sys/devices/system/cpu/cpu0/cache/index{index}/size"
MOST_CACHES = 6
Result = TypeVar("Result")
BIG_CORES = 1  # of the thread pool: prefer those

Facts = dict[str, Any]
"""What a device says of itself: cpu, triple, threads, form, cache_bytes; empty or 0 where it does not say."""


class Lost(Exception):
    """The session is gone, with whatever it was doing."""


class _State:
    """The state of this process."""

    session: rpc.RPCSession
    files = 0


_state = _State()


def connect(host: str, port: int, match_key: str, lifetime_s: float, threads: int) -> bool:
    """Begin a session, in place of the last."""
    disconnect()
    _state.session = rpc.connect(host, port, match_key, lifetime_s)
    if threads:
        _remote("runtime.config_threadpool")(BIG_CORES, threads)
    worker.start(RpcPrimitives)
    return True


def describe() -> Facts:
    """What the device says of itself, as far as it can be: what is none of LLVM's names, or no number, is left out."""
    return {
        "cpu": _named(_told("target.llvm_get_system_cpu", "")),
        "triple": _named(_told("target.llvm_get_system_triple", "")),
        "threads": _number(_told("runtime.NumThreads", 0), MOST_THREADS),
        "form": "ll" if _has("ffi.Module.load_from_file.ll") else "o",
        "cache_bytes": _cache_bytes(),
    }


def disconnect() -> bool:
    """End the session: the server is free for the next client."""
    worker.stop()
    if hasattr(_state, "session"):
        del _state.session
    return True


def probe(library: Path) -> float:
    """Nanoseconds of a fixed kernel."""
    with _watching():
        device = RpcPrimitives()
        module = device.load(library)
        tensors = [device.allocate(np.zeros((PROBE_SIZE, PROBE_SIZE), np.float32)) for _ in range(3)]
        timer = module.time_evaluator("main", _cpu(), number=PROBE_CALLS, repeat=PROBE_SAMPLES)
        return 1e9 * min(_sane(seconds) for seconds in timer(*tensors).results)


def set_up(given: MeasureInput, reference: Path) -> bool:
    """Have the kernel's inputs on the device, and the outputs of its default schedule, a library."""
    with _watching():
        worker.set_up(given, reference)
    return True


def watched(function: Callable[..., Result], *args: object) -> Result:
    """What a function of `worker` returns; Lost where the device is gone."""
    with _watching():
        return function(*args)


class RpcPrimitives(Primitives):
    """The device of this process's session, timed by its own clock."""

    rules = Rules(kept_bytes=HELD_BYTES, set_bytes=HELD_BYTES)

    def __init__(self) -> None:
        self._turn = self.allocate(np.zeros(1, np.int32))

    def allocate(self, array: np.ndarray) -> Buffer:
        """A tensor there."""
        return tvm.runtime.tensor(array, _cpu())

    def duplicate(self, buffer: Buffer) -> Buffer:
        """Another tensor there."""
        return buffer.copyto(tvm.runtime.empty(buffer.shape, buffer.dtype, _cpu()))

    def restore(self, to: Buffer, source: Buffer) -> None:
        """On the device."""
        source.copyto(to)

    def read(self, buffer: Buffer) -> np.ndarray:
        """A message with it all."""
        return np.asarray(buffer.numpy())

    def load(self, built: Path) -> Kernel:
        """Upload a library and load it; its file does not stay."""
        _state.files += 1
        name = f"{_state.files}{built.suffix}"
        _state.session.upload(bytearray(built.read_bytes()), name)
        try:
            return _state.session.load_module(name)
        finally:
            _state.session.remove(name)

    def run(self, kernel: Kernel, buffers: Sequence[Buffer]) -> None:
        """A call."""
        kernel["main"](*buffers)

    def sampler(self, kernel: Kernel, rotation: Rotation) -> Sampler:
        """Calls of the library's `step`, which goes from set to set; the turn is on the device."""
        arguments = [self._turn, *(tensor for each in rotation.sets for tensor in each)]

        def sample(calls: int) -> int:
            timer = kernel.time_evaluator("step", _cpu(), number=calls)
            return max(1, round(1e9 * _sane(timer(*arguments).results[0])))

        return sample

    def survive(self, error: Exception) -> None:
        """Raises Lost where the session is gone."""
        _check_session(error)


@contextmanager
def _watching() -> Iterator[None]:
    """An error becomes `Lost` where the session does not answer any more."""
    try:
        yield
    except Lost:
        raise
    except Exception as error:
        _check_session(error)
        raise


def _check_session(error: Exception) -> None:
    try:
        _remote("runtime.NumThreads")()
    except Exception:
        raise Lost(brief(error)) from None


def _sane(seconds: float) -> float:
    """A time that a clock can have measured; ValueError for any other."""
    if not 0 < seconds < MOST_SECONDS:
        raise ValueError(f"the device returned a time of {seconds} s")
    return seconds


def _cpu() -> tvm.runtime.Device:
    return _state.session.cpu()


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


def _named(told: object) -> str:
    """A name of a CPU or a triple; empty for anything else."""
    return str(told) if re.fullmatch(r"[\w.+-]{1,100}", str(told), re.ASCII) else ""


def _number(told: object, most: int) -> int:
    """A whole number from 0 to `most`; 0 for anything else."""
    text = str(told)
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) and int(text) <= most else 0


def _cache_bytes() -> int:
    """The largest cache of the first core, by Linux; 0 where it does not say."""
    sizes = [0]
    for index in range(MOST_CACHES):
        try:
            size = bytes(_state.session.download(CACHES.format(index=index))).strip(b"\0\n ")
        except Exception:  # no such file, or no such system
            break
        if size.endswith(b"K"):
            sizes.append(_number(size[:-1].decode(errors="replace"), MOST_CACHE_BYTES >> 10) << 10)
    return max(sizes)
