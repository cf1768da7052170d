"""What every part of a run has in common, and a model lowered for it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import tvm

from tunebench import environment
from tunebench.compile import passes
from tunebench.compile.tasks import Task, extract
from tunebench.devices.base import Backend
from tunebench.errors import TuneBenchError
from tunebench.model import workload
from tunebench.model.workload import Model
from tunebench.spec import Workload
from tunebench.tuning.database import Database, folder_name, provenance

SCRATCH_BYTES = 768 << 20  # of the compiler, the runtime and the probe, beyond the model


@dataclass(frozen=True)
class Session:
    """A run on one target."""

    backend: Backend
    work_dir: Path
    results_path: Path
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return self.backend.target

    @property
    def threads(self) -> int:
        """Of a CPU; 0 on a GPU."""
        return self.backend.threads

    def described(self) -> dict[str, object]:
        """The machine and, where it is not of the machine's own description, the device."""
        return {**environment.describe(), **self.backend.facts()}

    def database(self) -> Database:
        """The tuning database of this target and device; TuneBenchError where it was made for another."""
        made = provenance(self.target, self.backend.device, self.threads)
        return Database(self.work_dir / "tuning_logs" / folder_name(self.backend.target_name, made), made)


@dataclass(frozen=True)
class Lowered:
    """A model after the prefix, with its kernels, on a session's target."""

    session: Session
    model: Model
    mod: tvm.IRModule
    tasks: list[Task]


def lower(session: Session, load: Workload) -> Lowered:
    """Build a workload and lower it to the point where tuning and compiling begin."""
    model = workload.load(replace(load, device=session.backend.kind))
    check_memory(model, session.backend)
    mod = passes.prefix(workload.build(model), session.target)
    return Lowered(session, model, mod, extract(mod, model))


def model_name(load: Workload) -> str:
    """How rows name a model: a file's stem for a path."""
    return Path(load.model).stem if load.model.endswith(".json") else load.model


def check_memory(model: Model, backend: Backend) -> None:
    """Raise a TuneBenchError where the model will not fit, before anything is allocated."""
    free = backend.free_bytes()
    if free is None:
        return
    config, load = model.config, model.workload
    rows = max(load.buckets) * load.batch
    scratch = rows * (4 * config.intermediate_size + 8 * config.hidden_size) * 4 + SCRATCH_BYTES
    needed = model.weight_bytes + model.cache_bytes + scratch
    if needed > free:
        raise TuneBenchError(
            f"{load.model} in {load.scheme.name} needs about {needed / 2**30:.1f} GiB "
            f"(weights {model.weight_bytes / 2**30:.1f}, KV cache {model.cache_bytes / 2**30:.1f}), "
            f"and {free / 2**30:.1f} GiB are free.",
            "Choose fewer bits, a smaller --context or --batch, or another model.",
        )
