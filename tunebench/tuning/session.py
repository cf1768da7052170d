"""What every part of a run has in common, and a model lowered for it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import tvm

from tunebench import environment, installation
from tunebench.compile import passes
from tunebench.compile.tasks import Task, extract
from tunebench.devices.base import Device
from tunebench.errors import TuneBenchError
from tunebench.model import workload as workloads
from tunebench.model.description import Experts, Mlp
from tunebench.model.workload import Model
from tunebench.spec import Workload
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.files import folder_name

SCRATCH_BYTES = 768 << 20  # of the compiler, the runtime and the probe, beyond the model


@dataclass(frozen=True)
class Session:
    """A run on one target."""

    device: Device
    work_dir: Path
    results_path: Path
    run_name: str = ""  # as the user calls the run
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def target(self) -> tvm.target.Target:
        """TVM's target."""
        return self.device.target

    @property
    def threads(self) -> int:
        """Of a CPU; 0 on a GPU."""
        return self.device.threads

    def described(self) -> dict[str, object]:
        """The machine and, where it is not of the machine's own description, the device."""
        return {**environment.describe(), **self.device.facts()}

    def database(self) -> Database:
        """The tuning database of this target and device: of the work folder, or else the one that TuneBench comes with.

        TuneBenchError where the work folder's was made for another.
        """
        made = provenance(self.target, self.device.name, self.threads)
        name = folder_name(self.device.target_name, made)
        return Database(self.work_dir / "tuning_logs" / name, made, installation.tuning_logs() / name)


@dataclass(frozen=True)
class Lowered:
    """A model after the prefix, with its kernels, on a session's target."""

    session: Session
    model: Model
    mod: tvm.IRModule
    tasks: list[Task]


def lower(session: Session, workload: Workload) -> Lowered:
    """Build a workload and lower it to the point where tuning and compiling begin."""
    model = workloads.load_model(replace(workload, device_kind=session.device.kind))
    check_memory(model, session.device)
    mod = passes.prefix(workloads.build_module(model), session.target)
    return Lowered(session, model, mod, extract(mod, model))


def check_memory(model: Model, device: Device) -> None:
    """Raise a TuneBenchError where the model will not fit, before anything is allocated."""
    free = device.free_bytes()
    if free is None:
        return
    workload = model.workload
    needed = model.weight_bytes + model.cache_bytes + _scratch_bytes(model)
    if needed > free:
        raise TuneBenchError(
            f"{model.name} in {workload.scheme.name} needs about {needed / 2**30:.1f} GiB "
            f"(weights {model.weight_bytes / 2**30:.1f}, KV cache {model.cache_bytes / 2**30:.1f}), "
            f"and {free / 2**30:.1f} GiB are free.",
            "Choose fewer bits, a smaller --context or --batch, another model, or fewer --layers of it.",
        )


def _scratch_bytes(model: Model) -> int:
    """What the longest chunk has between its kernels, float32, and what is beyond the model."""
    widest = max(max(layer.attention.first.n, _inner(layer.mlp)) for layer in model.decoder.layers)
    rows = max(model.workload.chunk_sizes) * model.workload.batch
    return rows * (2 * widest + 8 * model.decoder.embedding.k) * 4 + SCRATCH_BYTES


def _inner(mlp: Mlp | Experts) -> int:
    """Of each row, in a layer's second half: in a mixture, of all the experts that the row goes to."""
    return mlp.up.n if isinstance(mlp, Mlp) else mlp.up.n // mlp.router.n * mlp.per_token
