"""A lowered model with its weights, ready to run: tuned where the database has records."""

from __future__ import annotations

from tunebench.bench.arms import Plan, load_own
from tunebench.compile.build import Records
from tunebench.engines.base import Engine
from tunebench.errors import TuneBenchError
from tunebench.model import weights as stored_weights
from tunebench.model.checkpoints import Checkpoint
from tunebench.model.workload import Model
from tunebench.tuning.lookup import Found, checked, look_up
from tunebench.tuning.session import Lowered


def known(lowered: Lowered) -> Found:
    """What the database holds for a model's kernels, as a bench uses it."""
    return checked(lowered, look_up(lowered.tasks, lowered.session.database()))


def load_ready(lowered: Lowered, records: Records, weights: str) -> Engine:
    """The engine of a model under these records, all else by default; a TuneBenchError where its device is absent."""
    session, model, device = lowered.session, lowered.model, lowered.session.device
    if device.absent:
        raise TuneBenchError(f"{device.target_name}: {device.absent}.", device.hint)
    compiled = {"it": device.compile(lowered.mod, model, records, session.work_dir)}
    return load_own(device, model, compiled, {"it": {}}, Plan((), weights=weights))["it"]


def real_weights(model: Model, weights: str) -> Checkpoint:
    """The weights that are named, or the model's own; a TuneBenchError where they are random."""
    found = stored_weights.chosen(model, weights)
    if found is None:
        hint = "Name a folder or a .gguf that has them with -m or --weights."
        raise TuneBenchError(f"{model.name} has random weights here, which predict nothing.", hint)
    return found
