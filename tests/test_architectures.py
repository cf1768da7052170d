"""Every architecture against transformers', on the same weights and tokens, and as code for GPUs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import tvm
from conftest import cpu_target, draw_records, load_model, lower, need, relative_error
from test_cuda import gpu_target
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import check as compile_check
from tunebench.compile import passes, tasks
from tunebench.compile.build import compile_model, compile_plan
from tunebench.compile.tasks import Task
from tunebench.engines.chunked import ChunkedEngine
from tunebench.engines.plan import Memory, PlanEngine
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model import architectures, sources, weights
from tunebench.model import workload as workloads
from tunebench.model.architectures import ModelConfig
from tunebench.model.workload import Model, with_rope
from tunebench.runtime import apis

PROMPT = 21  # no multiple of a chunk: 16 and then 5 in single tokens
GENERATED = 16
MORE = 27  # a second chunk of prompt, at depth
FLOAT32 = 1e-4
CASES = [(name, i) for name, each in architectures.architectures().items() for i in range(len(each.tiny))]

torch.set_num_threads(1)  # TVM has its own threads on the same cores

Records = Mapping[str, ms.database.TuningRecord]
Saved = Callable[..., tuple[PreTrainedModel, Path]]


def config_dict(config: ModelConfig) -> dict[str, Any]:
    """A config as transformers writes it today."""
    data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    rope = {"rope_type": "default", **(data.pop("rope_scaling") or {}), "rope_theta": data.pop("rope_theta")}
    if rope["rope_type"] == "longrope":
        data["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if "partial_rotary_factor" in data:
        rope["partial_rotary_factor"] = data.pop("partial_rotary_factor")
    if "rope_local_base_freq" in data:
        local = {"rope_type": "default", "rope_theta": data.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {**data, "rope_parameters": rope}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """One of an architecture's tiny models, and the folder that it is saved in; made once."""

    @functools.cache
    def get(name: str, i: int = 0) -> tuple[PreTrainedModel, Path]:
        model, folder = random_model(name, i), tmp_path_factory.mktemp(f"{name}-{i}")
        model.save_pretrained(folder)
        return model, folder

    return get


def random_model(name: str, i: int, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights, all of them large enough that every part of it shows."""
    torch.manual_seed(0)
    tiny = config_dict(architectures.architectures()[name].tiny[i]) | changes
    config = AutoConfig.for_model(name, **tiny, initializer_range=0.2, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith("bias"):
                weight.normal_(0, 0.2)
            elif "norm" in parameter:
                weight.uniform_(0.5, 1.5)
    return model


def reference_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits of every position, float32 [b, n, vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def compare(engine: ChunkedEngine, reference: PreTrainedModel, batch: int = 1) -> float:
    """Prompt, greedy decoding, a second chunk of prompt, on the same tokens: the largest relative error."""
    tokens = np.random.default_rng(1).integers(0, 127, (batch, PROMPT), np.int32)
    engine.prefill(tokens, 0)
    found = {PROMPT - 1: engine.logits()}
    for position in range(PROMPT, PROMPT + GENERATED):
        tokens = np.concatenate([tokens, engine.logits().argmax(-1)[:, None].astype(np.int32)], axis=1)
        engine.decode(tokens[:, -1:], position)
        found[position] = engine.logits()
    more = np.random.default_rng(2).integers(0, 127, (batch, MORE), np.int32)
    engine.prefill(more, tokens.shape[1])
    tokens = np.concatenate([tokens, more], axis=1)
    found[tokens.shape[1] - 1] = engine.logits()
    expected = reference_logits(reference, tokens)
    return max(relative_error(logits, expected[:, position]) for position, logits in found.items())


def build_engine(
    model: Model, folder: Path, target: tvm.target.Target, pick_records: Callable[[list[Task]], Records] | None = None
) -> TvmEngine:
    """An engine with the folder's weights."""
    mod, found = lower(model, target)
    compiled = compile_model(mod, target, pick_records(found) if pick_records else {})
    assert set(compiled.tuned) == ({task.key for task in found} if pick_records else set())
    return TvmEngine(
        model, compiled.executable, load(model, weights.read(model, sources.open_weights(folder)), tvm.cpu()), tvm.cpu()
    )


def random_schedules(target: tvm.target.Target, seed: int) -> Callable[[list[Task]], Records]:
    """Every kernel under a schedule drawn at random from its space."""
    return lambda found: draw_records(found, target, seed)


@pytest.mark.parametrize(("batch", "schedule"), [(1, None), (2, 0)], ids=["default", "random"])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_float32_logits_are_those_of_transformers(
    name: str, i: int, batch: int, schedule: int | None, target: tvm.target.Target, saved: Saved
) -> None:
    reference, folder = saved(name, i)
    records = None if schedule is None else random_schedules(target, schedule)
    engine = build_engine(load_model(folder / "config.json", "q0f32", batch), folder, target, records)
    assert compare(engine, reference, batch) < FLOAT32


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_gpu_says_what_transformers_says(name: str, i: int, saved: Saved) -> None:
    """All kernels of an architecture as plain source, run as a plan."""
    device = need(apis.open_device, "opencl")
    reference, folder = saved(name, i)
    model = load_model(folder / "config.json", "q0f32", chunks=(16,), device_kind="gpu")
    target = tvm.target.Target(device.target())
    made = compile_plan(passes.prefix(workloads.build_module(model), target), model, target, {}).plan
    assert made
    engine = PlanEngine(made, Memory(device, made, with_rope(model, weights.read(model, sources.open_weights(folder)))))
    assert compare(engine, reference) < FLOAT32


@pytest.mark.parametrize(("kind", "scheme"), [("cuda", "q4f16_1"), ("webgpu", "q0f32")])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_kernel_builds_for_gpus_that_are_not_here(
    name: str, i: int, kind: str, scheme: str, saved: Saved
) -> None:
    _, folder = saved(name, i)
    model = load_model(folder / "config.json", scheme, chunks=(16,), device_kind="gpu")
    target = gpu_target() if kind == "cuda" else cpu_target(kind)
    mod = passes.prefix(workloads.build_module(model), target)
    assert [each for each in compile_check.build_all(tasks.extract(mod, model), target) if each.error] == []


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_config_is_read_as_transformers_writes_it(name: str, i: int, saved: Saved) -> None:
    """Also in its earlier form, with one rope's keys at the top."""
    architecture = architectures.architectures()[name]
    tiny = architecture.tiny[i]
    data = json.loads((saved(name, i)[1] / "config.json").read_text())
    assert architectures.read(data, "config.json") == (architecture, tiny)
    top = {key: data[key] for key in ("original_max_position_embeddings",) if key in data}
    assert architecture.read({**msgspec.to_builtins(tiny), **top}, "config.json") == tiny


def test_a_difference_in_one_norm_shows(target: tvm.target.Target, saved: Saved) -> None:
    reference, folder = saved("llama")
    with torch.no_grad():
        norm = reference.model.layers[1].post_attention_layernorm.weight
        norm[3] *= 1.1
        error = compare(build_engine(load_model(folder / "config.json", "q0f32"), folder, target), reference)
        norm[3] /= 1.1
    assert error > 10 * FLOAT32


def test_a_prompt_beyond_the_context_is_refused(target: tvm.target.Target, saved: Saved) -> None:
    _, folder = saved("llama")
    engine = build_engine(load_model(folder / "config.json", "q0f32"), folder, target)
    tokens = np.zeros((1, 20), np.int32)
    with pytest.raises(TuneBenchError, match="130 positions"):
        engine.prefill(tokens, 110)
    engine.prefill(tokens, 108)
    with pytest.raises(TuneBenchError, match="129 positions"):
        engine.decode(tokens[:, :1], 128)
