"""This machine's CPU."""

from __future__ import annotations

from collections.abc import Mapping

import tvm

from tunebench import environment
from tunebench.compile import passes
from tunebench.compile.build import Compiled
from tunebench.devices.base import CHUNKS, MOST_WORKERS, Arrays, Device
from tunebench.devices.cpu_probe import cpu_probe
from tunebench.devices.probe import Probe
from tunebench.devices.targets import device_name
from tunebench.engines.base import Engine
from tunebench.engines.tvm import TvmEngine, load
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runners.local import LocalRunner
from tunebench.runtime.conditions import Conditions
from tunebench.runtime.cpu import CpuConditions
from tunebench.spec import TargetPreset


class CpuDevice(Device):
    """This machine's CPU."""

    kind, default_chunks = "cpu", CHUNKS["cpu"]

    def __init__(self, preset: TargetPreset, threads: int) -> None:
        self.target_name = preset.name
        cores = environment.usable_cores()
        environment.check_threads(threads, cores)
        self.threads = threads or cores
        self.target = passes.tvm_target(preset, self.threads)
        self.name = device_name(preset)
        self.cold_bytes = 2 * environment.last_level_cache_bytes()

    def free_bytes(self) -> int | None:
        """Of main memory."""
        return environment.available_memory_bytes()

    def runner(self) -> Runner:
        """Worker processes that build and measure in turn."""
        return LocalRunner(self.target, self.threads, min(MOST_WORKERS, environment.usable_cores()))

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """TVM's virtual machine."""
        environment.set_threads(self.threads)
        loaded = load(model, weights, tvm.cpu())
        return {name: TvmEngine(model, each.executable, loaded, tvm.cpu()) for name, each in compiled.items()}

    def probe(self) -> Probe:
        """Reads, copies and multiply-adds."""
        return cpu_probe(self.target, self.threads)

    def conditions(self) -> Conditions:
        """By the system."""
        return CpuConditions()
