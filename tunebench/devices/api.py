"""GPUs through an API that takes kernels as source text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm

from tunebench import environment
from tunebench.compile.build import Compiled, compile_plan
from tunebench.devices.api_probe import api_probe
from tunebench.devices.base import CACHE_BYTES, MOST_WORKERS, SYSTEMS, Arrays, Device, Records
from tunebench.devices.probe import Probe
from tunebench.engines.base import Engine
from tunebench.engines.plan import Memory, PlanEngine
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model, with_rope
from tunebench.runners.base import Runner
from tunebench.runners.fusion import FusionJudge
from tunebench.runners.gpu import GpuRunner
from tunebench.runners.shader import ShaderPrimitives
from tunebench.runtime import apis
from tunebench.runtime.conditions import Conditions
from tunebench.runtime.cuda import DeviceMemory
from tunebench.runtime.nvml import NvidiaConditions
from tunebench.spec import EngineName, TargetPreset


class ShaderDevice(Device):
    """The first device of a GPU API, which runs plans."""

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name, self.engine = preset.name, EngineName(preset.api)
        self._device = apis.open_device(preset.api)
        wanted, api = SYSTEMS.get(preset.name), str(self._device.facts["api"])
        if wanted and not api.endswith(wanted):
            raise TuneBenchError(f"target {preset.name!r} needs {wanted}, and this is {api}.", "Use --target webgpu.")
        self.name = self._device.name
        self._nvidia = "nvidia" in self.name.lower()
        if self._nvidia:
            environment.hold_nvidia_clocks()
        self.target = tvm.target.Target(self._device.target())
        self.cold_bytes = 2 * (self._device.cache_bytes or CACHE_BYTES)
        self._fusions = FusionJudge(self._device, self.cold_bytes)

    def free_bytes(self) -> int | None:
        """All of the device's memory, where the API says how much that is."""
        return self._device.free_bytes or None

    def facts(self) -> dict[str, Any]:
        """The API, its driver and the features in use, and what was decided on fused kernels."""
        return {"api": dict(self._device.facts), "fusions": dict(self._fusions.decided)}

    def runner(self) -> Runner:
        """One core is left for the search, one for the process that measures; builders compile on the device, too."""
        builders = min(MOST_WORKERS, max(1, environment.usable_cores() - 2))
        return GpuRunner(self.target, builders, functools.partial(ShaderPrimitives, self.engine))

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A plan; a kernel is fused where that is right and faster on this device."""
        return compile_plan(mod, model, self.target, records, self._fusions)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """Plans over one copy of the weights."""
        plans = {name: each.plan for name, each in compiled.items() if each.plan}
        memory = Memory(self._device, next(iter(plans.values())), with_rope(model, weights))
        return {name: PlanEngine(plan, memory) for name, plan in plans.items()}

    def probe(self) -> Probe:
        """Reads and copies."""
        return api_probe(self._device)

    def memory(self) -> DeviceMemory | None:
        """By NVML, where the device is NVIDIA's."""
        return DeviceMemory() if self._nvidia else None

    def conditions(self) -> Conditions:
        """By NVML, where the device is NVIDIA's."""
        return NvidiaConditions() if self._nvidia else Conditions()
