"""What runs a target's kernels on this machine: a CPU, CUDA, or a GPU API that takes source text.

A kind of device makes the parts that differ: TVM's target, the runner, the compiled model, the engines, the probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from tunebench.compile.build import Compiled, compile_model
from tunebench.devices.probe import Probe
from tunebench.engines.base import Engine
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runtime.conditions import Conditions
from tunebench.runtime.cuda import DeviceMemory
from tunebench.spec import EngineName

MOST_WORKERS = 8  # that hold memory: on a CPU inputs of twice the last-level cache, of an API a device
CACHE_BYTES = 64 << 20  # of a GPU that does not say: as much as the largest have

CHUNKS = {"cpu": (16, 128), "gpu": (16, 512)}
"""Lengths that prompts are cut into where the user names none: what fills a kind of device, and one for the rest."""
SYSTEMS = {"vulkan": "Vulkan", "metal": "Metal"}
"""By target, what WebGPU must be on."""

Records = Mapping[str, ms.database.TuningRecord]
Arrays = Iterable[tuple[str, np.ndarray]]


class Device:
    """One target on one device of this machine: a kind of device says what differs from the usual answers here."""

    target_name: str  # as the user says it
    target: tvm.target.Target
    name: str  # by its maker
    engine: EngineName = EngineName.TVM  # its own
    kind: str = "gpu"  # or cpu: which of the two ways to write kernels
    default_chunks: tuple[int, ...] = CHUNKS["gpu"]
    threads: int = 0  # of a CPU
    absent: str = ""  # why it can be compiled for, but not run here
    cold_bytes: int = 2 * CACHE_BYTES  # inputs larger than this do not stay in the caches
    hint: str = "`tunebench compile` needs no device."  # where it is absent, what to do

    def free_bytes(self) -> int | None:
        """Memory for a model; None where nobody says."""
        return None

    def facts(self) -> dict[str, Any]:
        """What results keep of the device beside the machine's own description."""
        return {}

    def runner(self) -> Runner:
        """Builds, checks and times candidates; TuneBenchError where nothing can be measured."""
        raise TuneBenchError(f"{self.target_name}: {self.absent}.", self.hint)

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A module after the prefix, for TVM's virtual machine; `folder` may keep what can be used again."""
        return compile_model(mod, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """An engine for each, over weights and a cache that they share."""
        return {}

    def probe(self) -> Probe:
        """Measures what the device can do."""
        return Probe()

    def memory(self) -> DeviceMemory | None:
        """Counts the device's memory from now on, where it can be counted."""
        return None

    def conditions(self) -> Conditions:
        """Its clocks, heat and energy, where it tells them."""
        return Conditions()
