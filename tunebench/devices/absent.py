"""A target that this machine can only generate code for."""

from __future__ import annotations

from pathlib import Path

import tvm

from tunebench.compile import passes
from tunebench.compile.build import Compiled, compile_plan
from tunebench.compile.source import LANGUAGES
from tunebench.devices.base import CHUNKS, Device, Records
from tunebench.model.workload import Model
from tunebench.spec import EngineName, TargetPreset


class AbsentDevice(Device):
    """A target that this machine can only generate code for."""

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name, self.engine = preset.name, EngineName(preset.api or EngineName.TVM)
        self.absent = preset.blocked or preset.absent or f"no device for {preset.name} on this machine"
        self.name = "none"
        self.kind = "cpu" if preset.device == "cpu" else "gpu"
        self.default_chunks = CHUNKS[self.kind]
        self._blocked = bool(preset.blocked)
        self.target = tvm.target.Target("opencl") if self._blocked else passes.tvm_target(preset, 1)

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """Sources where the target's kernels are source; `tunebench compile` builds for the others."""
        source = self.target.kind.name in LANGUAGES and not self._blocked
        return compile_plan(mod, model, self.target, records) if source else Compiled({}, 0)
