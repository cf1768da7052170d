"""Devices of one key at a tracker, as what runs a target's kernels; for tuning only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tunebench import environment
from tunebench.compile import passes
from tunebench.devices.base import CHUNKS, Device
from tunebench.errors import TuneBenchError
from tunebench.runners.base import Runner
from tunebench.runners.rpc import client
from tunebench.runners.rpc import runner as rpc_runner
from tunebench.runners.rpc.device import Facts
from tunebench.spec import TargetPreset


class RpcDevice(Device):
    """CPUs reached over RPC. `say` gets a line for what happens to them."""

    kind, default_chunks = "cpu", CHUNKS["cpu"]
    hint = "Bench where the device is, with the database that this machine made."

    def __init__(
        self, preset: TargetPreset, tracker: str, key: str, threads: int, linker: str, say: Callable[[str], None]
    ) -> None:
        if preset.device != "cpu":
            raise TuneBenchError(
                f"the runner 'rpc' measures kernels for CPUs, and {preset.name!r} is none.", "Name another --target."
            )
        if not (tracker and key):
            missing = "--key" if tracker else "--tracker"
            raise TuneBenchError(f"--runner rpc needs {missing}.", "Write --tracker HOST:PORT --key NAME.")
        self._tracker, self._key, self._linker, self._say = tracker, key, linker, say
        self._facts, self._devices = client.describe(tracker, key)
        self.target_name = preset.name
        cores = self._facts["threads"]
        environment.check_threads(threads, cores or threads, f"devices of key {key!r} have")
        self.threads = threads or cores or 1
        self.target = passes.tvm_target(_told(preset, key, self._facts), self.threads)
        cpu = self.target.attrs.get("mcpu", "")
        self.name = f"{key} ({cpu})" if cpu else key
        self.cold_bytes = 2 * (self._facts["cache_bytes"] or environment.ASSUMED_CACHE_BYTES)
        self.absent = f"{key} is reached over RPC"

    def facts(self) -> dict[str, Any]:
        """The devices, and what they said; a runner knows how they compare."""
        return {"rpc": {"tracker": self._tracker, "key": self._key, "devices": self._devices, **self._facts}}

    def runner(self) -> Runner:
        """Builders on all cores but the one of the search: devices need none of this machine's."""
        builders = max(1, environment.usable_cores() - 1)
        form = "so" if self._linker else self._facts["form"]
        return rpc_runner.RpcRunner(
            self.target, self.threads, builders, self._tracker, self._key, form, self._linker, self._say
        )


def _told(preset: TargetPreset, key: str, facts: Facts) -> TargetPreset:
    """The preset with what the device says of its CPU, never this machine's; the preset's own words come first."""
    attrs = dict(preset.attrs)
    if not facts["cpu"] and not {"mcpu", "mtriple"} & set(attrs):
        raise TuneBenchError(
            f"devices of key {key!r} do not say what CPU they have.", "Name their --target: `tunebench list targets`."
        )
    attrs.setdefault("mcpu", facts["cpu"] or "generic")
    if facts["triple"]:
        attrs.setdefault("mtriple", facts["triple"])
    wanted, found = (str(triple).partition("-")[0] for triple in (attrs.get("mtriple", ""), facts["triple"]))
    if found and wanted != found:
        raise TuneBenchError(
            f"devices of key {key!r} are {found}, and {preset.name!r} is {wanted}.", "Name their --target."
        )
    return replace(preset, attrs=tuple(attrs.items()))
