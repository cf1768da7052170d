"""A worker process of any runner: what is sent to it, and what runs in it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import connection
from typing import Any

from tvm.support.popen_pool import PopenPoolExecutor, PopenWorker

from tunebench import installation, stopping
from tunebench.errors import TuneBenchError, brief
from tunebench.runners.base import START_TIMEOUT_S, Died, Failed, MeasureInput, NotBuilt, Outcome, TimedOut, Wrong
from tunebench.runners.bench import Bench, Primitives, held_bytes
from tunebench.timing import Protocol

LATE_S = 2.0  # that an answer may take which nobody waits for any more


class Worker(PopenWorker):
    """TVM's worker process in a session of its own, so that Ctrl-C is its parent's alone; it ends with that."""

    _proc: subprocess.Popen[bytes] | None

    def _start(self) -> None:
        if self._proc is not None:
            return
        if sys.platform == "win32":
            super()._start()
            return
        main_read, worker_write = os.pipe()
        worker_read, main_write = os.pipe()
        pipes = (worker_read, worker_write)
        program = "from tunebench.runners import child; child.main()"
        command = installation.python(program, *map(str, (os.getpid(), *pipes)))
        with stopping.held():  # or a process that has begun would be nobody's
            self._proc = subprocess.Popen(
                command, pass_fds=pipes, stdout=self._stdout, stderr=self._stderr, start_new_session=True
            )
            self._reader, self._writer = os.fdopen(main_read, "rb"), os.fdopen(main_write, "wb")
        for pipe in pipes:
            os.close(pipe)


class Pool(PopenPoolExecutor):
    """TVM's pool, of such workers."""

    def _worker_run(self, fn: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        with self._lock:
            thread = threading.get_ident()
            if thread not in self._worker_map:
                self._worker_map[thread] = Worker(self._initializer, self._initargs)
            found = self._worker_map[thread]
        found.send(fn, args, kwargs, self._timeout)
        return found.recv()


class Process:
    """A process that holds a device's primitives; one that died or hung is started again when it is next asked."""

    def __init__(self, make: Callable[..., Primitives], *args: object) -> None:
        self._make = (make, *args)
        self._owes = False  # an answer that a signal kept its caller from
        self._begin()

    def _begin(self) -> None:
        self._worker = Worker(stderr=subprocess.DEVNULL)
        self._worker.send(start_measuring, self._make, timeout=START_TIMEOUT_S)
        self._starting = True

    @property
    def is_alive(self) -> bool:
        """Whether what it was sent before is still there."""
        return bool(self._worker.is_alive())

    def send(self, timeout_s: float, function: Callable[..., Any], *args: object) -> None:
        """Begin a function there; `receive` has what it returns. Raises where the process could not begin."""
        if self._owes:
            self._drop_answer()
        if not self.is_alive:
            self._begin()
        if self._starting:
            self._starting = False
            try:
                self._worker.recv()
            except (TimeoutError, ChildProcessError) as error:
                self._worker.kill()
                raise TuneBenchError(
                    f"a worker process did not start ({brief(error)}).", "See what else takes memory and cores."
                ) from None
            except BaseException:
                self._worker.kill()
                raise
        with stopping.held():  # it is sent whole, and then its answer is owed
            self._worker.send(function, args, timeout=timeout_s)
            self._owes = True

    def receive(self) -> Any:
        """What the function returned; Failed where it, or its process, did not end well."""
        self._owes = True
        try:
            self._wait()
            with stopping.held():  # the answer is there, and is read whole
                self._owes = False
                return self._worker.recv()
        except TuneBenchError:
            raise
        except TimeoutError:
            failed: Failed = TimedOut("timed out")
        except Exception as error:  # whatever it raised
            failed = Died(brief(error))
        self.kill()  # after an error of a GPU nothing in that process works
        return failed

    def _wait(self, timeout_s: float | None = None) -> bool:
        """Wait for an answer; whether there is one."""
        return sys.platform == "win32" or bool(connection.wait([self._worker._reader.fileno()], timeout_s))

    def _drop_answer(self) -> None:
        """Read what is owed, or end a process that does not come to an end."""
        if self.is_alive and self._wait(LATE_S):
            self.receive()
        else:
            self.kill()

    def ask(self, timeout_s: float, function: Callable[..., Any], *args: object) -> Any:
        """Run a function there and wait for it."""
        self.send(timeout_s, function, *args)
        return self.receive()

    def kill(self) -> None:
        """End it at once."""
        self._owes = False
        self._worker.kill()


# -- in a worker ------------------------------------------------------------------------------------------


class _Worker:
    """The state of one worker process."""

    device: Primitives
    benches: dict[str, Bench]


_worker = _Worker()


def start(make: Callable[..., Primitives], *args: object) -> None:
    """Begin: `make(*args)` opens the device, or what builds for it."""
    _worker.device, _worker.benches = make(*args), {}


def start_measuring(make: Callable[..., Primitives], *args: object) -> None:
    """As `start`, with the device open."""
    start(make, *args)
    _worker.device.open()


def stop() -> None:
    """Drop the device's primitives, and all input sets."""
    vars(_worker).clear()


def build(mod_json: str) -> NotBuilt | None:
    """Compile a kernel; why it cannot be, or None."""
    try:
        _worker.device.build(mod_json)
    except Exception as error:  # whatever code generation raises is the candidate's fault
        return NotBuilt(brief(error))
    return None


def set_up(given: MeasureInput, reference: Any = None) -> Bench:
    """A kernel's inputs, kept from before or made now in the place of those that were used longest ago."""
    device, benches = _worker.device, _worker.benches
    bench = benches.pop(given.name, None)
    if not bench:
        needed = held_bytes(given, device.rules.set_bytes)
        while benches and needed + sum(each.held_bytes for each in benches.values()) > device.rules.kept_bytes:
            benches.pop(next(iter(benches)))
        bench = Bench(device, given, reference or given.reference)
    benches[given.name] = bench
    return bench


def prepare(given: MeasureInput, protocol: Protocol) -> Outcome:
    """Times of the default schedule."""
    bench = set_up(given)
    return bench.time({"default": bench.default}, protocol)["default"]


def check_and_time(given: MeasureInput, built: Any, protocol: Protocol, limit_ns: int) -> Outcome:
    """What becomes of a candidate."""
    bench = set_up(given)
    kernel = _loaded(built)
    if isinstance(kernel, Failed):
        return kernel
    try:
        return bench.check_and_time(kernel, protocol, limit_ns)
    except Exception as error:  # whatever the candidate raises
        _worker.device.survive(error)
        return Died(brief(error))


def compare(
    given: MeasureInput, built: Mapping[str, Any], protocol: Protocol, with_default: bool
) -> dict[str, Outcome]:
    """Check and time several candidates, interleaved."""
    bench = set_up(given)
    outcomes: dict[str, Outcome] = {}
    kernels: dict[str, Any] = {"default": bench.default} if with_default else {}
    for name, each in built.items():
        kernel = _loaded(each)
        failed = kernel if isinstance(kernel, Failed) else _checked(bench, kernel)
        if failed:
            outcomes[name] = failed
        else:
            kernels[name] = kernel
    return {**outcomes, **bench.time(kernels, protocol)}


def _loaded(built: Any) -> Any:
    """A kernel, or why there is none."""
    try:
        return _worker.device.load(built)
    except Exception as error:  # whatever code generation raises is the candidate's fault
        _worker.device.survive(error)
        return NotBuilt(brief(error))


def _checked(bench: Bench, kernel: Any) -> Failed | None:
    try:
        wrong = bench.check(kernel)
    except Exception as error:  # whatever the candidate raises
        _worker.device.survive(error)
        return Died(brief(error))
    return Wrong(wrong) if wrong else None
