"""Build kernels here, for another machine; check and time them on every free device of one key at TVM's tracker.

A candidate is queued when it is built, and a device takes the next one when it has done the last. Each device is served
by a thread here and a process of its own, so that one that hangs or dies costs nothing but its trial, which another
device repeats. Sessions end after some minutes: others get their turn at the tracker, and a server ends a kernel that
does not, which TVM's server only does when the session's time is over.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm

from tunebench.errors import TuneBenchError, brief
from tunebench.runners import worker
from tunebench.runners.base import (
    BUILD_TIMEOUT_S,
    START_TIMEOUT_S,
    Candidate,
    Died,
    Failed,
    MeasureInput,
    NotBuilt,
    Outcome,
    Trial,
    for_each,
)
from tunebench.runners.bench import count_sets
from tunebench.runners.rpc import device as rpc_device
from tunebench.runners.rpc import library as rpc_library
from tunebench.runners.rpc.client import CONNECT_TIMEOUT_S, SESSION_S, Client, disagreement
from tunebench.runners.rpc.device import Lost
from tunebench.runners.rpc.library import HELD_BYTES
from tunebench.runners.rpc.tracker import Grant, Tracker
from tunebench.runners.worker import Pool
from tunebench.timing import Protocol

SET_UP_TIMEOUT_S = 180.0  # of inputs on their way to a device, and one run of the default schedule
RUN_TIMEOUT_S = 20.0  # of a candidate; a slow kernel gets more
LONG_TIMEOUT_S = 900.0  # of what runs a default schedule many times, which nothing bounds
MOST_LOSSES = 2  # a candidate that takes so many devices down is at fault
MOST_SET_UPS = 4  # devices that may be lost before they have a kernel's inputs
GONE_S = 30.0  # without a device, before the run gives up where the tracker has none either
ASK_AGAIN_S = 1.0


@dataclass
class _Task:
    """Something to do on one device, which one does not matter."""

    given: MeasureInput
    work: Callable[..., Any]
    arguments: tuple[object, ...]
    timeout_s: float
    done: Future[Any] = field(default_factory=Future)
    losses: int = 0
    set_ups: int = 0

    @property
    def needs_s(self) -> float:
        """At most, of a session."""
        return SET_UP_TIMEOUT_S + self.timeout_s


class RpcRunner:
    """Builders here, and the devices of a key, as many as the tracker gives. `say` gets a line for each event."""

    builds_ahead = True

    def __init__(
        self, target: tvm.target.Target, threads: int, builders: int, tracker: str, key: str, form: str,
        linker: str, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._tracker, self._key, self._threads, self._say = Tracker(tracker), key, threads, say
        self._tracker.devices(key)
        self._folder = tempfile.TemporaryDirectory(prefix="tunebench-")
        self._pool = Pool(max_workers=builders, timeout=BUILD_TIMEOUT_S)
        self._packing = (tvm.ir.save_json(target), form, linker)
        self._numbers = itertools.count()
        self._sets: dict[str, int] = {}
        self._references: dict[str, Future[str]] = {}
        self._trials: dict[str, Future[Outcome]] = {}
        self._queue: deque[_Task] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._idle: list[Client] = []
        self._busy: dict[str, Client] = {}  # by device
        self._hung: dict[str, str] = {}  # devices that were lost and did not come back, and why
        self.probe_ns: dict[str, float] = {}  # by device
        self.lost: list[str] = []  # a line for each loss
        self.queued_s = 0.0
        self._without_s = time.monotonic()  # since when there is no device
        self._probe = self._compile(tvm.ir.save_json(rpc_library.probe_kernel()), 1)
        self._threads_running = [threading.Thread(target=self._acquire, daemon=True)]
        self._threads_running[0].start()

    # -- what a tuning run calls ------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the tracker's queue and the devices, end the workers and drop what they compiled."""
        self._closed = True
        self._tracker.close()  # first, or it would give this runner the devices that are free now
        with self._change:
            self._change.notify_all()
        end = time.monotonic() + RUN_TIMEOUT_S
        for thread in self._threads_running:  # TVM's server ends with a session that is cut off at work
            thread.join(max(0.0, end - time.monotonic()))
        with self._change:
            for client in self._busy.values():
                client.stop()
        for thread in self._threads_running:
            thread.join(START_TIMEOUT_S)
        for client in self._idle:
            client.kill()
        for built in (self._probe, *self._references.values(), *self._trials.values()):
            built.cancel()  # type: ignore[attr-defined]
        self._pool.shutdown(wait=True)
        self._folder.cleanup()

    def facts(self) -> dict[str, Any]:
        """How the devices compare in the probe, and which were lost."""
        return {"probe_ns": dict(self.probe_ns), "disagreement": self.disagreement(), "lost": list(self.lost)}

    def prepare(self, given: MeasureInput, protocol: Protocol) -> Outcome:
        """Run the default schedule on one device."""
        return self._now(_Task(given, worker.prepare, (given, protocol), LONG_TIMEOUT_S))  # type: ignore[no-any-return]

    def build(self, trial: Trial, candidates: Sequence[Candidate]) -> dict[str, Failed]:
        """Begin to compile, and to time what is compiled."""
        for candidate in candidates:
            if candidate.name == trial.given.name:  # the default schedule, which `prepare` times
                self._sets_of(trial.given)
            else:
                self._trials[candidate.name] = self._begin(candidate, trial)
        return {}

    def time(self, trial: Trial, name: str) -> Outcome:
        """What became of a candidate, once a device is done with it."""
        return self._wait(self._trials.pop(name))  # type: ignore[no-any-return]

    def compare(
        self, given: MeasureInput, candidates: Sequence[Candidate], protocol: Protocol, with_default: bool = True
    ) -> dict[str, Outcome]:
        """Check and time several candidates on one device, interleaved."""
        sets = self._sets_of(given)
        building = {candidate.name: self._compile(candidate.json, sets) for candidate in candidates}
        outcomes: dict[str, Outcome] = {}
        libraries: dict[str, Path] = {}
        for name, built in building.items():
            try:
                libraries[name] = Path(built.result())
            except Exception as error:  # whatever code generation raises is the candidate's fault
                outcomes[name] = NotBuilt(brief(error))
        found = self._now(_Task(given, worker.compare, (given, libraries, protocol, with_default), LONG_TIMEOUT_S))
        return {**outcomes, **for_each(found, libraries)}

    def disagreement(self) -> str:
        """In words, where devices of the key differ by more than `client.AGREE` in the probe's time; else empty."""
        return disagreement(self._key, dict(self.probe_ns))

    # -- builds -----------------------------------------------------------------------------------------------

    def _compile(self, mod_json: str, sets: int) -> Future[str]:
        stem = Path(self._folder.name) / str(next(self._numbers))
        built: Future[str] = self._pool.submit(_build, mod_json, sets, str(stem), *self._packing)
        return built

    def _sets_of(self, given: MeasureInput) -> int:
        if given.name not in self._sets:
            self._sets[given.name] = count_sets(given, HELD_BYTES)
            self._references[given.name] = self._compile(given.reference, self._sets[given.name])
        return self._sets[given.name]

    def _begin(self, candidate: Candidate, trial: Trial) -> Future[Outcome]:
        """Compile a candidate; it is queued for a device when that is done."""
        outcome: Future[Outcome] = Future()

        def queue(built: Future[str]) -> None:
            if built.cancelled():
                outcome.cancel()
            elif error := built.exception():  # whatever code generation raises is the candidate's fault
                outcome.set_result(NotBuilt(brief(error)))
            else:
                timeout_s = max(RUN_TIMEOUT_S, 20 * trial.limit_ns / 1e9)
                work = (trial.given, Path(built.result()), trial.protocol, trial.limit_ns)
                self._add(_Task(trial.given, worker.check_and_time, work, timeout_s, outcome))

        self._compile(candidate.json, self._sets_of(trial.given)).add_done_callback(queue)
        return outcome

    # -- the queue --------------------------------------------------------------------------------------------

    def _add(self, task: _Task, first: bool = False) -> None:
        with self._change:
            if first:
                self._queue.appendleft(task)
            else:
                self._queue.append(task)
            self._change.notify_all()

    def _now(self, task: _Task) -> Any:
        """Do something before anything else that waits."""
        self._sets_of(task.given)
        self._add(task, first=True)
        return self._wait(task.done)

    def _wait(self, future: Future[Any]) -> Any:
        """A result. Time without any device is queueing; TuneBenchError where no device will come."""
        while True:
            before = time.monotonic()
            try:
                return future.result(timeout=ASK_AGAIN_S)
            except NotYet:
                if any(self._busy):  # the process without a device has no name
                    self._without_s = time.monotonic()
                    continue
            self.queued_s += time.monotonic() - before
            without_s = time.monotonic() - self._without_s
            if without_s > GONE_S:
                listed = self._tracker.devices(self._key)
                if set(listed) <= set(self._hung) and without_s > SESSION_S + GONE_S:  # servers have ended what hung
                    lost = ", ".join(f"{name} ({why})" for name, why in self._hung.items())
                    raise TuneBenchError(
                        f"no device of key {self._key!r} is left: {lost}.",
                        "Start their servers again, then run the same command: what was measured is kept.",
                    )

    # -- devices ----------------------------------------------------------------------------------------------

    def _acquire(self) -> None:
        """Take every device that the tracker gives, each in a thread of its own."""
        client: Client | None = None
        while not self._closed:
            try:
                client = client or self._ready()  # first: a server takes back what nobody uses within seconds
                grant = self._tracker.request(self._key)
            except (OSError, ValueError, Lost):  # the tracker is gone, or restarted
                time.sleep(ASK_AGAIN_S)
                continue
            thread = threading.Thread(target=self._serve, args=(grant, client), daemon=True)
            client = None
            self._threads_running = [each for each in self._threads_running if each.is_alive()] + [thread]
            thread.start()
        if client:
            client.kill()

    def _ready(self) -> Client:
        """A process that has imported what it needs."""
        with self._change:
            if self._idle:
                return self._idle.pop()
            client = self._busy[""] = Client()
        try:
            client.ask(START_TIMEOUT_S, rpc_device.disconnect)
        finally:
            with self._change:
                self._busy.pop("")
        return client

    def _serve(self, grant: Grant, client: Client) -> None:
        """One session with one device: task after task."""
        with self._change:
            if not self._closed:
                self._busy[grant.device] = client
            first = self._queue[0] if self._queue else None
        lifetime_s = max(SESSION_S, 2 * first.needs_s if first else 0.0)
        started = time.monotonic()
        kept = False
        try:
            place = (grant.host, grant.port, grant.match_key, lifetime_s, self._threads)
            if not self._closed:
                client.ask(CONNECT_TIMEOUT_S, rpc_device.connect, *place)
                self._greet(grant.device, client)
                while task := self._next(started + lifetime_s, lifetime_s):
                    self._do(client, task)
                client.ask(CONNECT_TIMEOUT_S, rpc_device.disconnect)
                kept = not self._closed
        except Exception as error:
            self._lose(grant.device, brief(error))
        if not kept:
            client.kill()
        with self._change:
            self._busy.pop(grant.device, None)
            self._idle += [client] if kept else []
            self._change.notify_all()

    def _greet(self, device: str, client: Client) -> None:
        """A device that is new is probed."""
        self._hung.pop(device, None)
        if device in self.probe_ns:
            return
        library = Path(self._probe.result())
        before = self.disagreement()
        self.probe_ns[device] = client.ask(RUN_TIMEOUT_S, rpc_device.probe, library)
        words = self.disagreement()
        if words and words != before:
            self._say(words)

    def _next(self, end: float, lifetime_s: float) -> _Task | None:
        """The next task; None where the session should end."""
        with self._change:
            while not self._closed:
                left = end - time.monotonic()
                needs_s = self._queue[0].needs_s if self._queue else SET_UP_TIMEOUT_S + RUN_TIMEOUT_S
                if left < needs_s or lifetime_s > max(SESSION_S, 4 * needs_s):
                    return None
                if self._queue:
                    return self._queue.popleft()
                self._change.wait(ASK_AGAIN_S)
        return None

    def _do(self, client: Client, task: _Task) -> None:
        """A task on a device. Where that loses the device, another one does it, but not again and again."""
        try:
            reference = Path(self._references[task.given.name].result())
        except Exception as error:
            task.done.set_result(NotBuilt(f"its default schedule does not build: {brief(error)}"))
            return
        task.set_ups += 1
        try:
            client.ask(SET_UP_TIMEOUT_S, rpc_device.set_up, task.given, reference)
            task.set_ups, task.losses = 0, task.losses + 1
            result = client.ask(task.timeout_s, rpc_device.watched, task.work, *task.arguments)
        except Lost as lost:
            if not self._closed and task.losses < MOST_LOSSES and task.set_ups < MOST_SET_UPS:
                self._add(task, first=True)
            else:
                task.done.set_result(Died(f"its devices were lost, the last: {brief(lost)}"))
            raise
        except Exception as error:  # a default schedule that fails, or a time that cannot be
            result = Died(brief(error))
        task.done.set_result(result)

    def _lose(self, device: str, why: str) -> None:
        if self._closed:
            return
        self._hung[device] = why
        line = f"device {device} was lost ({why}); others go on, and it may come back"
        self.lost.append(line)
        self._say(line)


def _build(mod_json: str, sets: int, stem: str, target: str, form: str, linker: str) -> str:
    """In a builder: the path of a library."""
    return str(rpc_library.build(mod_json, sets, tvm.ir.load_json(target), form, linker, Path(stem)))
