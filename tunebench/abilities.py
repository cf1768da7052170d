"""What this machine can do for a target, and why not more. Needs no TVM."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from tunebench import apis, environment
from tunebench.errors import TuneBenchError
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
        return Abilities(_without(preset), preset.absent or "compiled for only")
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
    if not preset.generates:
        return frozenset()
    return frozenset({"generate", "build"} if preset.device in ("cpu", "cuda") else {"generate"})
