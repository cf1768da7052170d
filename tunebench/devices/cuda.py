"""NVIDIA's GPUs, through CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tvm

from tunebench import environment
from tunebench.compile import nvrtc, passes
from tunebench.compile.build import Compiled, compile_model
from tunebench.devices.base import Arrays, Device, Records
from tunebench.devices.cuda_probe import cuda_probe
from tunebench.devices.probe import Probe
from tunebench.devices.targets import device_name
from tunebench.engines.base import Engine
from tunebench.engines.cuda_graph import CudaEngine
from tunebench.engines.tvm import load
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runners.cuda import CudaPrimitives
from tunebench.runners.gpu import GpuRunner
from tunebench.runtime import cublas
from tunebench.runtime import cuda as cuda_runtime
from tunebench.runtime.conditions import Conditions
from tunebench.runtime.cuda import DeviceMemory
from tunebench.runtime.nvml import NvidiaConditions
from tunebench.spec import TargetPreset


class CudaDevice(Device):
    """This machine's first NVIDIA GPU, through CUDA."""

    def __init__(self, preset: TargetPreset) -> None:
        cublas.register()  # which kernels may call
        self.target_name = preset.name
        self.target = passes.tvm_target(preset, 0)
        self.name = device_name(preset)
        self.cold_bytes = 2 * cuda_runtime.l2_bytes()

    def free_bytes(self) -> int | None:
        """Of device memory."""
        return cuda_runtime.free_bytes()

    def runner(self) -> Runner:
        """One core is left for the search, one for the process on the GPU."""
        return GpuRunner(self.target, max(1, environment.usable_cores() - 2), CudaPrimitives)

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """For TVM's virtual machine, with cubins kept in the folder."""
        with nvrtc.compiling(folder / "cubins"):
            return compile_model(mod, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """CUDA graphs of what TVM's virtual machine launches."""
        device = cuda_runtime.DEVICE
        loaded = load(model, weights, device)
        return {name: CudaEngine(model, each.executable, loaded, device) for name, each in compiled.items()}

    def probe(self) -> Probe:
        """Reads, copies and a matrix product."""
        return cuda_probe(self.target)

    def memory(self) -> DeviceMemory | None:
        """By NVML."""
        return DeviceMemory()

    def conditions(self) -> Conditions:
        """By NVML."""
        return NvidiaConditions(cuda_runtime.bus_id())
