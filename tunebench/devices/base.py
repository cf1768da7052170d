"""What runs a target's kernels on this machine: a CPU, CUDA, or a GPU API that takes source text.

Each device makes the parts that differ: TVM's target, the runner of trials, the compiled model, the engine, the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from tunebench.compile.build import Compiled
from tunebench.engines.base import Engine
from tunebench.model.workload import Model
from tunebench.runners.base import Runner
from tunebench.runtime.cuda import DeviceMemory
from tunebench.spec import EngineName
from tunebench.timing import Samples

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


class Device(Protocol):
    """One target on one device of this machine."""

    target_name: str  # as the user says it
    target: tvm.target.Target
    name: str  # by its maker
    engine: EngineName  # its own
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


class NoProbe:
    """For a device without a probe."""

    held_bytes = 0

    def __init__(self) -> None:
        self.arms: dict[str, Callable[[], object]] = {}

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """None."""
        return {}
