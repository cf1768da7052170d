"""What a bench compares: engines under a schedule on a target, loaded and ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tunebench import environment
from tunebench.compile.build import Compiled
from tunebench.engines.base import Engine
from tunebench.engines.baselines import Peer, peers
from tunebench.errors import TuneBenchError
from tunebench.model import weights
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.spec import EngineName, Schedule, Test
from tunebench.timing import Protocol
from tunebench.tuning.database import Database
from tunebench.tuning.session import SCRATCH_BYTES, Lowered, model_name

PROTOCOL = Protocol(warmups=1, samples=10, least_samples=5, budget_s=30.0, patience_s=60.0)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure of one model. Times in seconds."""

    tests: tuple[Test, ...]
    schedules: tuple[Schedule, ...] = ("default", "tuned")  # of TuneBench's own engines
    engines: tuple[str, ...] = (EngineName.TVM,)
    protocol: Protocol = PROTOCOL
    sample_limit_s: float = 300.0  # a test whose one sample would take longer is not run
    weights: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared; or why it cannot run."""

    lowered: Lowered
    engine: str
    schedule: Schedule  # default, tuned; library for an engine that brings its own kernels
    loaded: Engine | None = None
    compiled: Compiled | None = None
    reason: str = ""
    database: Database | None = field(default=None, compare=False)


def load_arms(lowered: Sequence[Lowered], plan: Plan, say: Say) -> dict[str, Arm]:
    """Every arm by name, its weights loaded. Peers run on the first target."""
    arms: dict[str, Arm] = {}
    for each in lowered if set(plan.engines) - set(peers()) else []:
        for schedule, arm in _own(each, plan, say).items():
            arms[f"{label(each)} {schedule}" if len(lowered) > 1 else schedule] = arm
    for name in plan.engines:
        if name in peers():
            arms[name] = _peer(lowered[0], peers()[name], plan, say)
    return arms


def label(lowered: Lowered) -> str:
    """A target's name, and how it is run where that is not by its own engine."""
    device = lowered.session.device
    return f"{device.target_name} {device.engine}" if device.engine == EngineName.BROWSER else device.target_name


def _own(lowered: Lowered, plan: Plan, say: Say) -> dict[str, Arm]:
    """TuneBench's own engine under each schedule."""
    session, model = lowered.session, lowered.model
    device, name = session.device, session.device.target_name
    database = session.database()
    records = database.promoted()
    tuned = any(task.key in records for task in lowered.tasks)
    missing = [] if tuned or device.absent else [each for each in plan.schedules if each == "tuned"]
    if missing and device.engine != EngineName.BROWSER:
        raise TuneBenchError(
            f"nothing tuned for {model_name(model.workload)} in {database.folder}.",
            "Run `tunebench tune` first, or bench with --schedule default.",
        )
    say(f"compile for {name}")
    compiled: dict[str, Compiled] = {
        each: device.compile(lowered.mod, model, records if each == "tuned" else {}, session.work_dir)
        for each in plan.schedules
        if each not in missing
    }
    if device.absent:
        return {each: Arm(lowered, device.engine, each, reason=device.absent) for each in plan.schedules}
    say(f"load weights for {name}")
    loaded = device.engines(model, compiled, _weights(model, plan))
    arms: dict[str, Arm] = {
        each: Arm(lowered, device.engine, each, loaded[each], compiled[each], database=database)
        for each in plan.schedules
        if each in compiled
    }
    untuned = "kernels are not tuned in a browser"
    return arms | {each: Arm(lowered, device.engine, each, reason=untuned) for each in missing}


def _peer(lowered: Lowered, peer: Peer, plan: Plan, say: Say) -> Arm:
    """Another engine, on the same weights."""
    session, model = lowered.session, lowered.model
    reason = peer.refuses(model) or _no_room(model)
    if reason:
        return Arm(lowered, peer.name, "library", reason=reason)
    say(f"load weights into {peer.name}")
    session.work_dir.mkdir(parents=True, exist_ok=True)
    engine = peer.load(model, _weights(model, plan), session.threads, session.work_dir)
    return Arm(lowered, peer.name, "library", engine)


def _no_room(model: Model) -> str:
    """Why another copy of the weights and the cache will not fit, or an empty string."""
    if model.workload.device_kind == "gpu":
        return ""  # a peer says itself what it finds no room for
    needed, free = model.weight_bytes + model.cache_bytes + SCRATCH_BYTES, environment.available_memory_bytes()
    if needed <= free:
        return ""
    return f"a second copy of the model needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _weights(model: Model, plan: Plan) -> Iterable[tuple[str, np.ndarray]]:
    return weights.read(model, plan.weights) if plan.weights else workloads.random_weights(model, plan.seed)
