"""What a bench compares: engines under a schedule on a target, loaded and ready to run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tunebench import environment
from tunebench.compile.build import Compiled
from tunebench.devices.base import Device
from tunebench.engines.base import Engine
from tunebench.engines.baselines import Peer, peers
from tunebench.engines.chunked import Chunk, ChunkedEngine, split_prompt
from tunebench.errors import TuneBenchError
from tunebench.model import weights
from tunebench.model.workload import Model
from tunebench.results import Quality
from tunebench.spec import EngineName, Schedule, Test
from tunebench.timing import Protocol
from tunebench.tuning.lookup import Found, checked, look_up, missing_line, older_line
from tunebench.tuning.session import SCRATCH_BYTES, Lowered

PROTOCOL = Protocol(warmups=1, samples=20, least_samples=5, budget_s=30.0, patience_s=60.0)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure of one model. Times in seconds."""

    tests: tuple[Test, ...]
    schedules: tuple[Schedule, ...] = ("default", "tuned")  # of TuneBench's own engines
    engines: tuple[str, ...] = (EngineName.TVM,)
    protocol: Protocol = PROTOCOL
    sample_limit_s: float = 300.0  # a test whose one sample would take longer is not run
    weights: str = ""  # random, or where they are; empty: the model's own, or else random
    seed: int = 0
    quality: Mapping[str, Quality] = field(default_factory=dict)  # of the model in its scheme, by `label`


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared; or why it cannot run."""

    lowered: Lowered
    engine: str
    schedule: Schedule  # default, tuned; library for an engine that brings its own kernels
    loaded: Engine | None = None
    compiled: Compiled | None = None
    reason: str = ""
    found: Found | None = None  # what is known of its kernels, where they are TuneBench's own

    @functools.cached_property
    def chunk_ns(self) -> dict[int, float]:
        """Expected time of a chunk of each size, of those where it is known."""
        return self.found.chunk_ns(self.lowered.tasks, self.schedule) if self.found else {}

    def cut(self, test: Test) -> list[Chunk]:
        """How the test's prompt is cut."""
        workload = self.lowered.model.workload
        return split_prompt(test.n_prompt, test.n_depth, workload.chunks, workload.context, self.chunk_ns)


def compile_arms(lowered: Sequence[Lowered], plan: Plan, say: Say, warn: Say) -> dict[str, Arm]:
    """Every arm by name, compiled. Peers run on the first target. `warn` gets a line about kernels without a record."""
    arms: dict[str, Arm] = {}
    for each in lowered if set(plan.engines) - set(peers()) else []:
        for schedule, arm in _own(each, plan, say, warn).items():
            arms[f"{label(each)} {schedule}" if len(lowered) > 1 else schedule] = arm
    for name in plan.engines:
        if name in peers():
            arms[name] = Arm(lowered[0], name, "library", reason=peers()[name].refuses(lowered[0].model))
    return arms


def load_arms(arms: Mapping[str, Arm], plan: Plan, say: Say) -> dict[str, Arm]:
    """The same arms with their weights loaded; those of one target share them."""
    loaded = dict(arms)
    for lowered in {id(arm.lowered): arm.lowered for arm in arms.values()}.values():
        own = {name: arm for name, arm in arms.items() if arm.lowered is lowered and arm.compiled and not arm.reason}
        if own:
            say(f"load weights for {lowered.session.device.target_name}")
            compiled = {name: arm.compiled for name, arm in own.items() if arm.compiled}
            expected = {name: arm.chunk_ns for name, arm in own.items()}
            engines = load_own(lowered.session.device, lowered.model, compiled, expected, plan)
            loaded |= {name: replace(own[name], loaded=engine) for name, engine in engines.items()}
    for name, arm in arms.items():
        if arm.schedule == "library" and not arm.reason:
            loaded[name] = _with_peer(arm, plan, say)
    return loaded


def label(lowered: Lowered) -> str:
    """A target's name, and how it is run where that is not by its own engine."""
    device = lowered.session.device
    return f"{device.target_name} {device.engine}" if device.engine == EngineName.BROWSER else device.target_name


def _own(lowered: Lowered, plan: Plan, say: Say, warn: Say) -> dict[str, Arm]:
    """TuneBench's own engine under each schedule."""
    session, model, device = lowered.session, lowered.model, lowered.session.device
    database = session.database()
    found = look_up(lowered.tasks, database)
    if "tuned" in plan.schedules:
        say(f"check kernels tuned at another context for {device.target_name}")
        found = checked(lowered, found)
    missing = [] if found.records or device.absent else [each for each in plan.schedules if each == "tuned"]
    if missing and device.engine != EngineName.BROWSER:
        raise TuneBenchError(
            f"nothing tuned for {model.name} in {database.folder}.",
            "Run `tunebench tune` first, or bench with --schedule default.",
        )
    if "tuned" in plan.schedules and not missing and not device.absent:
        _warn_of_missing(lowered, found, warn)
    say(f"compile for {device.target_name}")
    compiled: dict[Schedule, Compiled] = {
        each: device.compile(lowered.mod, model, found.records if each == "tuned" else {}, session.work_dir)
        for each in plan.schedules
        if each not in missing
    }
    if device.absent:
        return {each: Arm(lowered, device.engine, each, reason=device.absent) for each in plan.schedules}
    untuned = "kernels are not tuned in a browser"
    return {
        each: Arm(lowered, device.engine, each, compiled=compiled[each], found=found)
        if each in compiled
        else Arm(lowered, device.engine, each, reason=untuned)
        for each in plan.schedules
    }


def _warn_of_missing(lowered: Lowered, found: Found, warn: Say) -> None:
    for line in (missing_line(lowered, found), older_line(lowered, found.entries)):
        if line:
            warn(line)


def load_own(
    device: Device,
    model: Model,
    compiled: Mapping[str, Compiled],
    chunk_ns: Mapping[str, Mapping[int, float]],
    plan: Plan,
) -> dict[str, Engine]:
    """An engine for each compiled model, over one copy of the weights; prompts are cut by the times expected."""
    engines = device.engines(model, compiled, weights.load(model, plan.weights, plan.seed))
    for name, engine in engines.items():
        if isinstance(engine, ChunkedEngine):
            engine.chunk_ns = chunk_ns[name]
    return engines


def load_peer(peer: Peer, model: Model, threads: int, folder: Path, plan: Plan) -> Engine:
    """Another engine, on the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    return peer.load(model, weights.load(model, plan.weights, plan.seed), threads, folder)


def _with_peer(arm: Arm, plan: Plan, say: Say) -> Arm:
    session, model = arm.lowered.session, arm.lowered.model
    reason = _no_room(model)
    if reason:
        return replace(arm, reason=reason)
    say(f"load weights into {arm.engine}")
    return replace(arm, loaded=load_peer(peers()[arm.engine], model, session.threads, session.work_dir, plan))


def run_test(engine: Engine, model: Model, test: Test, seed: int) -> None:
    """One sample of a test: prompt, then generated tokens, at depth. Neither tokenizes nor samples."""
    workload, vocab = model.workload, model.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab, (workload.batch, test.n_tokens), np.int32)
    if test.n_prompt:
        engine.prefill(tokens[:, : test.n_prompt], test.n_depth)
    for i in range(test.n_prompt, test.n_tokens):
        engine.decode(tokens[:, i : i + 1], test.n_depth + i)
    engine.wait()


def _no_room(model: Model) -> str:
    """Why another copy of the weights and the cache will not fit, or an empty string."""
    if model.workload.device_kind == "gpu":
        return ""  # a peer says itself what it finds no room for
    needed, free = model.weight_bytes + model.cache_bytes + SCRATCH_BYTES, environment.available_memory_bytes()
    if needed <= free:
        return ""
    return f"a second copy of the model needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
