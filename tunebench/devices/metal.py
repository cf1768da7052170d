"""A GPU of an API that TVM's own runtime has, as Metal on macOS."""

from __future__ import annotations

from collections.abc import Mapping

import tvm

from tunebench.compile import passes
from tunebench.compile.build import Compiled
from tunebench.devices.base import Arrays, Device
from tunebench.engines.base import Engine
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runners.local import LocalRunner
from tunebench.spec import TargetPreset


class MetalDevice(Device):
    """The first GPU of an API that TVM's own runtime has, as Metal on macOS."""

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name = preset.name
        self._device = tvm.device(preset.device)
        if not self._device.exist:
            raise TuneBenchError(f"no {preset.name} device.", f"`tunebench compile --target {preset.name}` needs none.")
        self.name = str(self._device.device_name)
        self.target = passes.tvm_target(preset, 0)

    def runner(self) -> Runner:
        """One process that builds and measures."""
        return LocalRunner(self.target, 1, 1, self._device.type)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """TVM's virtual machine."""
        loaded = load(model, weights, self._device)
        return {name: TvmEngine(model, each.executable, loaded, self._device) for name, each in compiled.items()}
