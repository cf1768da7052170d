"""A process that has sessions with devices of a key, and what the devices say and how they compare."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from tunebench.errors import TuneBenchError, brief
from tunebench.runners.base import START_TIMEOUT_S
from tunebench.runners.rpc import device as rpc_device
from tunebench.runners.rpc.device import Facts, Lost
from tunebench.runners.rpc.tracker import Tracker
from tunebench.runners.worker import Worker

SESSION_S = 400.0  # of a session with a device, unless it must be longer
CONNECT_TIMEOUT_S = 20.0
AGREE = 1.25  # devices of one key should not differ by more than this factor in the probe's time


class Client(Worker):
    """A process that has sessions with devices, one after the other."""

    def __init__(self) -> None:
        super().__init__(stderr=subprocess.DEVNULL)

    def ask(self, timeout_s: float, function: Callable[..., Any], *args: object) -> Any:
        """What a function of `device` returns there; Lost where the device, or that process, is gone."""
        self.send(function, args, timeout=timeout_s)
        try:
            return self.recv()
        except TimeoutError:
            raise Lost(f"no answer in {timeout_s:.0f} s") from None
        except (ChildProcessError, OSError) as error:
            raise Lost(brief(error)) from None

    def stop(self) -> None:
        """End the process at once, from any thread; who waits for it gets Lost."""
        if self._proc:
            self._proc.kill()


def disagreement(key: str, probe_ns: dict[str, float]) -> str:
    """In words, where devices differ by more than `AGREE` in the probe's time; else empty."""
    if not probe_ns or max(probe_ns.values()) <= AGREE * min(probe_ns.values()):
        return ""
    slowest, fastest = max(probe_ns, key=lambda d: probe_ns[d]), min(probe_ns, key=lambda d: probe_ns[d])
    factor = probe_ns[slowest] / probe_ns[fastest]
    return (
        f"devices of key {key!r} disagree: {slowest} takes {factor:.2f}x as long as {fastest} for the same kernel "
        f"({AGREE:.2f}x is allowed), so times of trials are not comparable; decisions are each from one device"
    )


def describe(tracker: str, key: str) -> tuple[Facts, list[str]]:
    """What the first device that is free says of itself, and all devices of the key; TuneBenchError without one."""
    queue = Tracker(tracker)
    devices = queue.devices(key)
    client = Client()
    failures = []
    try:
        client.ask(START_TIMEOUT_S, rpc_device.disconnect)
        for _ in devices:
            try:
                grant = queue.request(key)
                place = (grant.host, grant.port, grant.match_key, SESSION_S, 0)
                client.ask(CONNECT_TIMEOUT_S, rpc_device.connect, *place)
                facts: Facts = client.ask(CONNECT_TIMEOUT_S, rpc_device.describe)
                return facts, devices
            except Exception as error:  # the next one may answer
                failures.append(brief(error))
    finally:
        client.kill()
    raise TuneBenchError(
        f"no device of key {key!r} answers: {failures[-1]}.", "Restart their servers, and look at what they print."
    )
