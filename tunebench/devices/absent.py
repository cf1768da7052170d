"""A target that this machine can only generate code for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm

from tunebench.compile import passes
from tunebench.compile.build import Compiled, compile_plan
from tunebench.compile.source import LANGUAGES
from tunebench.devices.base import CACHE_BYTES, AnyProbe, Arrays, Records
from tunebench.engines.base import Engine
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runtime.cuda import DeviceMemory
from tunebench.spec import EngineName, TargetPreset


class AbsentDevice:
    """A target that this machine can only generate code for."""

    threads, cold_bytes = 0, CACHE_BYTES

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name, self.engine = preset.name, EngineName(preset.api or EngineName.TVM)
        self.absent = preset.blocked or preset.absent or f"no device for {preset.name} on this machine"
        self.name = "none"
        self.kind = "cpu" if preset.device == "cpu" else "gpu"
        self._blocked = bool(preset.blocked)
        self.target = tvm.target.Target("opencl") if self._blocked else passes.tvm_target(preset, 1)

    def free_bytes(self) -> int | None:
        """There is no memory to fit in."""
        return None

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """Sources where the target's kernels are source; `tunebench compile` builds for the others."""
        source = self.target.kind.name in LANGUAGES and not self._blocked
        return compile_plan(mod, model, self.target, records) if source else Compiled({}, 0)

    def runner(self) -> Runner:
        """Raises: nothing can be measured."""
        raise TuneBenchError(f"{self.target_name}: {self.absent}.", "`tunebench compile` needs no device.")

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """None."""
        return {}

    def probe(self) -> AnyProbe:
        """Raises: nothing can be measured."""
        raise TuneBenchError(f"{self.target_name}: {self.absent}.", "`tunebench compile` needs no device.")

    def memory(self) -> DeviceMemory | None:
        """None."""
        return None
