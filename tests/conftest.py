"""A tiny llama, its tasks, and schedules drawn at random: what the tests of the compile half share."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores: libraries must not spin on all of them
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TVM_NUM_THREADS="1")
    os.environ["TVM_THREAD_POOL_SPIN_COUNT"] = "0"

import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tvm
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tunebench import installation
from tunebench.compile import passes, tasks
from tunebench.compile.tasks import Task
from tunebench.devices.targets import presets
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.runners.base import Failed, MeasureInput, Outcome
from tunebench.spec import Scheme, WeightFormat, Workload
from tunebench.tuning import search
from tunebench.tuning.entry import Entry

Opened = TypeVar("Opened")

CHUNKS = (16, 32)
CONTEXT = 128
THREADS = 2
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
ASYMMETRIC = {
    zero: Scheme(f"q4f16_{zero}", WeightFormat("integer", 4, "float16", 32, zero), "float16")
    for zero in ("zero_point", "minimum")
}
"""Schemes that no template reads, by what their groups have."""


def need(open_it: Callable[..., Opened], *given: object) -> Opened:
    """What is opened; the test is skipped, with the words that a user would read, where there is no such thing."""
    try:
        return open_it(*given)
    except TuneBenchError as error:
        pytest.skip(str(error))


def write_config(folder: Path, **changes: object) -> Path:
    """A tiny llama's config.json."""
    path = folder / "tiny.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    return path


def load_model(config: Path, scheme: str | Scheme, batch: int = 1, **changes: Any) -> Model:
    """The tiny model in a scheme."""
    shape = {"chunks": CHUNKS, "context": CONTEXT, **changes}
    scheme = quantization.schemes()[scheme] if isinstance(scheme, str) else scheme
    return workloads.load_model(Workload(str(config), scheme, batch, **shape))


def cpu_target(name: str = "llvm") -> tvm.target.Target:
    """TVM's target of a preset."""
    return passes.tvm_target(presets()[name], THREADS)


def lower(model: Model, target: tvm.target.Target) -> tuple[tvm.IRModule, list[Task]]:
    """The model after the prefix, and its tasks; made once for each workload and target."""
    return _lowered(model.workload, str(target), Path(model.workload.model).read_text())


@functools.cache
def _lowered(workload: Workload, target: str, config: str) -> tuple[tvm.IRModule, list[Task]]:
    model = workloads.load_model(workload)
    mod = passes.prefix(workloads.build_module(model), tvm.target.Target(json.loads(target)))
    return mod, tasks.extract(mod, model)


def begin_search(task: Task, target: tvm.target.Target, seed: int = 0) -> search.TaskSearch:
    """A task with the space that the tuner would give it."""
    return search.begin(task, Entry(task.name), target, THREADS, depth=40, cold_bytes=1, seed=seed)


def draw_designs(task: Task, target: tvm.target.Target, seed: int) -> list[s_tir.Schedule]:
    """One random draw of every design of the task's space."""
    return list(begin_search(task, target, seed).context.generate_design_space())


def record_of(task: Task, schedule: s_tir.Schedule, target: tvm.target.Target) -> ms.database.TuningRecord:
    """A tuning record of a schedule, as if it had been measured."""
    return ms.database.TuningRecord(schedule.trace, ms.database.Workload(task.mod), [1e-3], target, None)


def draw_records(found: Iterable[Task], target: tvm.target.Target, seed: int) -> dict[str, ms.database.TuningRecord]:
    """A record for every task: one design, one draw."""
    rng = random.Random(seed)
    return {task.key: record_of(task, rng.choice(draw_designs(task, target, seed)), target) for task in found}


def input_of(name: str, mod: tvm.IRModule, depth: int = 40) -> MeasureInput:
    """A kernel as a runner wants it, without cold caches."""
    return MeasureInput(name, tvm.ir.save_json(mod), depth, cold_bytes=1)


def why(outcome: Outcome | None) -> str:
    """Why a candidate has no times, or an empty string."""
    return outcome.reason if isinstance(outcome, Failed) else ""


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, as a part of the largest reference value."""
    return float(np.abs(found - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="session", autouse=True)
def no_packed_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests begin without databases, also on a device that TuneBench comes with one for."""
    empty = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installation, "tuning_logs", lambda: empty)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests remember of their databases is gone after them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def target() -> tvm.target.Target:
    """This machine's CPU."""
    return cpu_target()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama's config.json."""
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def small_caches() -> Iterator[None]:
    """A last-level cache of a few KiB, so that a kernel's cold inputs stay small."""
    from tunebench import environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "last_level_cache_bytes", lambda: 1 << 14)
        yield
