"""What runs a target's kernels on this machine: a CPU, CUDA, or a GPU API that takes source text.

Each backend makes the parts that differ: TVM's target, the runner of trials, the compiled model, the engine, the probe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from tunebench import apis, browser_engine, cuda_compiler, cuda_runtime, environment, lowering
from tunebench.api_probe import ApiProbe
from tunebench.compile import Compiled, compile_model, compile_plan
from tunebench.cuda_engine import CudaEngine
from tunebench.cuda_probe import CudaProbe
from tunebench.cuda_runtime import DeviceMemory
from tunebench.engines import Engine
from tunebench.errors import TuneBenchError
from tunebench.gpu_runner import GpuRunner
from tunebench.measure import Samples
from tunebench.plan_engine import Memory, PlanEngine
from tunebench.probe import Probe
from tunebench.programs import LANGUAGES
from tunebench.runners.local import LocalRunner
from tunebench.spec import TargetPreset
from tunebench.targets import device_name
from tunebench.trials import Runner
from tunebench.tvm_engine import TvmEngine, load
from tunebench.workload import Model, angles

OWN_ENGINE = "tvm"  # on TVM's virtual machine
MOST_WORKERS = 8  # that hold memory: on a CPU inputs of twice the last-level cache, of an API a device
CACHE_BYTES = 64 << 20  # of a GPU that does not say: as much as the largest have

SYSTEMS = {"vulkan": "Vulkan", "metal": "Metal"}
"""By target, what WebGPU must be on."""

Records = Mapping[str, ms.database.TuningRecord]
Arrays = Iterable[tuple[str, np.ndarray]]


class AnyProbe(Protocol):
    """What a device can do at most, as arms of a measurement."""

    held_bytes: int
    arms: dict[str, Callable[[], object]]

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Per second."""
        ...


class Backend(Protocol):
    """One target on one device of this machine."""

    target_name: str  # as the user says it
    target: tvm.target.Target
    device: str  # by its maker's name
    engine: str  # the name of its own engine
    kind: str  # cpu or gpu: which of the two ways to write kernels
    threads: int  # of a CPU; 0 on a GPU
    absent: str  # why it can be compiled for, but not run here; empty where it can
    cold_bytes: int  # inputs larger than this do not stay in the caches

    def free_bytes(self) -> int | None:
        """Memory for a model; None where nobody says."""
        ...

    def facts(self) -> dict[str, Any]:
        """What results keep of the device beside the machine's own description."""
        ...

    def runner(self) -> Runner:
        """Builds, checks and times candidates."""
        ...

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A module after the prefix; `folder` may keep what can be used again."""
        ...

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """An engine for each, over weights and a cache that they share."""
        ...

    def probe(self) -> AnyProbe:
        """Measures what the device can do."""
        ...

    def memory(self) -> DeviceMemory | None:
        """Counts the device's memory from now on, where it can be counted."""
        ...


class CpuBackend:
    """This machine's CPU."""

    engine, kind, absent = "tvm", "cpu", ""

    def __init__(self, preset: TargetPreset, threads: int) -> None:
        self.target_name = preset.name
        self.threads = threads or environment.usable_cores()
        environment.set_threads(self.threads)
        self.target = lowering.tvm_target(preset, self.threads)
        self.device = device_name(preset)
        self.cold_bytes = 2 * environment.last_level_cache_bytes()

    def free_bytes(self) -> int | None:
        """Of main memory."""
        return environment.available_memory_bytes()

    def facts(self) -> dict[str, Any]:
        """Nothing: the machine's description has the CPU."""
        return {}

    def runner(self) -> Runner:
        """Worker processes that build and measure in turn."""
        return LocalRunner(self.target, self.threads, min(MOST_WORKERS, environment.usable_cores()))

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """For TVM's virtual machine."""
        return compile_model(mod, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """TVM's virtual machine."""
        loaded = load(model, weights, tvm.cpu())
        return {name: TvmEngine(model, each.executable, loaded, tvm.cpu()) for name, each in compiled.items()}

    def probe(self) -> AnyProbe:
        """Read bandwidth and multiply-adds."""
        return Probe(self.target, self.threads)

    def memory(self) -> DeviceMemory | None:
        """The process's own counters serve."""
        return None


class RuntimeBackend:
    """The first GPU of an API that TVM's own runtime has, as Metal on macOS."""

    engine, kind, threads, absent, cold_bytes = OWN_ENGINE, "gpu", 0, "", 2 * CACHE_BYTES

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name = preset.name
        self._device = tvm.device(preset.device)
        if not self._device.exist:
            raise TuneBenchError(f"no {preset.name} device.", f"`tunebench compile --target {preset.name}` needs none.")
        self.device = str(self._device.device_name)
        self.target = lowering.tvm_target(preset, 0)

    def free_bytes(self) -> int | None:
        """TVM does not say."""
        return None

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def runner(self) -> Runner:
        """One process that builds and measures."""
        return LocalRunner(self.target, 1, 1, self._device.type)

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """For TVM's virtual machine."""
        return compile_model(mod, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """TVM's virtual machine."""
        loaded = load(model, weights, self._device)
        return {name: TvmEngine(model, each.executable, loaded, self._device) for name, each in compiled.items()}

    def probe(self) -> AnyProbe:
        """Nothing is measured."""
        return NoProbe()

    def memory(self) -> DeviceMemory | None:
        """Nobody counts it."""
        return None


class NoProbe:
    """For a device without a probe."""

    held_bytes = 0

    def __init__(self) -> None:
        self.arms: dict[str, Callable[[], object]] = {}

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """None."""
        return {}


class CudaBackend:
    """This machine's first NVIDIA GPU, through CUDA."""

    engine, kind, threads, absent = "tvm", "gpu", 0, ""

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name = preset.name
        self.target = lowering.tvm_target(preset, 0)
        self.device = device_name(preset)
        self.cold_bytes = 2 * cuda_runtime.l2_bytes()

    def free_bytes(self) -> int | None:
        """Of device memory."""
        return cuda_runtime.free_bytes()

    def facts(self) -> dict[str, Any]:
        """Nothing: the machine's description has NVIDIA's GPUs."""
        return {}

    def runner(self) -> Runner:
        """One core is left for the search, one for the process on the GPU."""
        return GpuRunner(self.target, max(1, environment.usable_cores() - 2), "tunebench.runners.cuda")

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """For TVM's virtual machine, with cubins kept in the folder."""
        cuda_compiler.install(folder / "cubins")
        return compile_model(mod, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """CUDA graphs of what TVM's virtual machine launches."""
        device = cuda_runtime.DEVICE
        loaded = load(model, weights, device)
        return {name: CudaEngine(model, each.executable, loaded, device) for name, each in compiled.items()}

    def probe(self) -> AnyProbe:
        """A copy and a matrix product."""
        return CudaProbe()

    def memory(self) -> DeviceMemory | None:
        """By NVML."""
        return DeviceMemory()


class ApiBackend:
    """The first device of a GPU API, which runs plans."""

    kind, threads, absent = "gpu", 0, ""

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name, self.engine = preset.name, preset.api
        self._device = apis.open_device(preset.api)
        wanted, api = SYSTEMS.get(preset.name), str(self._device.facts["api"])
        if wanted and not api.endswith(wanted):
            raise TuneBenchError(f"target {preset.name!r} needs {wanted}, and this is {api}.", "Use --target webgpu.")
        self.device = self._device.name
        self._nvidia = "nvidia" in self.device.lower()
        if self._nvidia:
            environment.hold_nvidia_clocks()
        self.target = tvm.target.Target(self._device.target())
        self.cold_bytes = 2 * (self._device.cache_bytes or CACHE_BYTES)

    def free_bytes(self) -> int | None:
        """All of the device's memory, where the API says how much that is."""
        return self._device.free_bytes or None

    def facts(self) -> dict[str, Any]:
        """The API, its driver and the features in use."""
        return {"api": dict(self._device.facts)}

    def runner(self) -> Runner:
        """One core is left for the search, one for the process that measures; builders compile on the device, too."""
        builders = min(MOST_WORKERS, max(1, environment.usable_cores() - 2))
        return GpuRunner(self.target, builders, f"tunebench.runners.{self.engine}")

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A plan."""
        return compile_plan(mod, model, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """Plans over one copy of the weights."""
        plans = {name: each.plan for name, each in compiled.items() if each.plan}
        arrays = ((name, array) for each in (weights, [("angles", angles(model))]) for name, array in each)
        memory = Memory(self._device, next(iter(plans.values())), arrays)
        return {name: PlanEngine(self.engine, plan, memory) for name, plan in plans.items()}

    def probe(self) -> AnyProbe:
        """A copy."""
        return ApiProbe(self._device)

    def memory(self) -> DeviceMemory | None:
        """By NVML, where the device is NVIDIA's."""
        return DeviceMemory() if self._nvidia else None


class BrowserBackend:
    """The WebGPU of this machine's web browser, which runs plans in a page."""

    engine, kind, threads, absent, cold_bytes = browser_engine.NAME, "gpu", 0, "", CACHE_BYTES

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name = preset.name
        self._facts = browser_engine.adapter_facts()
        self.device = str(self._facts["name"])
        self.target = tvm.target.Target(browser_engine.webgpu_target(self._facts))

    def free_bytes(self) -> int | None:
        """A page is not told."""
        return None

    def facts(self) -> dict[str, Any]:
        """The adapter, its features and limits."""
        return {"api": {"api": "WebGPU in a browser", **self._facts}}

    def runner(self) -> Runner:
        """Raises: trials are measured without a browser."""
        raise TuneBenchError("kernels are not tuned in a browser.", "Tune --target webgpu without --engine browser.")

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A plan; TuneBenchError where the adapter lacks what the scheme needs."""
        browser_engine.check_dtype(self._facts, model.workload.scheme.dtype)
        return compile_plan(mod, model, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """Plans on one page, over one copy of the weights."""
        arrays = ((name, array) for each in (weights, [("angles", angles(model))]) for name, array in each)
        made: dict[str, Engine] = {}
        first: browser_engine.BrowserEngine | None = None
        for name, each in compiled.items():
            if each.plan:
                made[name] = engine = browser_engine.BrowserEngine(each.plan, () if first else arrays, beside=first)
                first = first or engine
        return made

    def probe(self) -> AnyProbe:
        """Nothing is measured."""
        return NoProbe()

    def memory(self) -> DeviceMemory | None:
        """Nobody counts it."""
        return None


class AbsentBackend:
    """A target that this machine can only generate code for."""

    threads, cold_bytes = 0, CACHE_BYTES

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name, self.engine = preset.name, preset.api or OWN_ENGINE
        self.absent = preset.blocked or preset.absent or f"no device for {preset.name} on this machine"
        self.device = "none"
        self.kind = "cpu" if preset.device == "cpu" else "gpu"
        self._blocked = bool(preset.blocked)
        self.target = tvm.target.Target("opencl") if self._blocked else lowering.tvm_target(preset, 1)

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


@functools.cache
def open_backend(preset: TargetPreset, threads: int = 0, engine: str = "") -> Backend:
    """The backend of a preset; TuneBenchError where a package, a driver or a device is missing."""
    if engine == browser_engine.NAME:
        return BrowserBackend(preset)
    if not preset.runs_here:
        return AbsentBackend(preset)
    if preset.api:
        return ApiBackend(preset)
    if preset.device == "cpu":
        return CpuBackend(preset, threads)
    return CudaBackend(preset) if preset.kind == "cuda" else RuntimeBackend(preset)
