"""A lowered model with its weights, ready to run: tuned where the database has records."""

from __future__ import annotations

from pathlib import Path

from tunebench.bench.arms import Plan, load_own
from tunebench.compile.build import Records
from tunebench.engines.base import Engine
from tunebench.errors import TuneBenchError
from tunebench.tuning.lookup import Found, checked, look_up
from tunebench.tuning.session import Lowered


def known(lowered: Lowered) -> Found:
    """What the database holds for a model's kernels, as a bench uses it."""
    return checked(lowered, look_up(lowered.tasks, lowered.session.database()))


def load_ready(lowered: Lowered, records: Records, weights: Path | None) -> Engine:
    """The engine of a model under these records, all else by default; a TuneBenchError where its device is absent."""
    session, model, device = lowered.session, lowered.model, lowered.session.device
    if device.absent:
        raise TuneBenchError(f"{device.target_name}: {device.absent}.", device.hint)
    compiled = {"it": device.compile(lowered.mod, model, records, session.work_dir)}
    return load_own(device, model, compiled, {"it": {}}, Plan((), weights=weights))["it"]
