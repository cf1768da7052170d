"""What this machine can do for a target, and why not more. Needs no TVM."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from tunebench import environment
from tunebench.errors import TuneBenchError
from tunebench.runtime import apis
from tunebench.spec import TargetPreset

ACTIONS = ("generate", "build", "check", "time", "run")
"""Sources; binaries or pipelines; compare with the reference; measure; a whole model, end to end."""


@dataclass(frozen=True)
class Abilities:
    """What of `ACTIONS` can be done; on what, or why no more."""

    can: frozenset[str]
    words: str


def of(preset: TargetPreset) -> Abilities:
    """This machine's abilities for a target."""
    everything = frozenset(ACTIONS)
    if not preset.runs_here:
        return Abilities(_without(preset), preset.blocked or preset.absent or "no such device here")
    if preset.api:
        try:
            device = apis.open_device(preset.api)
        except TuneBenchError as error:
            return Abilities(frozenset({"generate"}), str(error))
        return Abilities(everything, device.name)
    if preset.device == "cuda":
        found = environment.gpus()
        if found:
            return Abilities(everything, str(found[0]["name"]))
        builds = {"build"} if importlib.util.find_spec("cuda") else set()
        return Abilities(frozenset({"generate", *builds}), "no NVIDIA GPU")
    return Abilities(everything, environment.cpu_name())


def _without(preset: TargetPreset) -> frozenset[str]:
    """What needs no device: a CPU's code is built with LLVM, a GPU's sources are built by its driver."""
    if preset.blocked:
        return frozenset()
    return frozenset({"generate", "build"} if preset.device in ("cpu", "cuda") else {"generate"})


def api_devices() -> Iterator[tuple[str, str]]:
    """Each GPU API with its device and driver, or why it has none."""
    for name in apis.apis():
        try:
            device = apis.open_device(name)
        except TuneBenchError as error:
            yield name, str(error)
        else:
            yield name, f"{device.name}, {device.facts['api']}, driver {device.facts['driver']}"
