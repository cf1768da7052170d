"""A compiled llama in every scheme against transformers', on the same weights and tokens; how weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from conftest import (
    ASYMMETRIC,
    LLAMA,
    begin_search,
    load_model,
    lower,
    record_of,
    write_config,
)
from test_architectures import FLOAT32, build_engine, compare, random_schedules
from transformers import LlamaConfig, LlamaForCausalLM

from tunebench.compile.build import compile_model
from tunebench.devices.targets import cpu_device
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model import quantization, sources, weights
from tunebench.model.workload import Model
from tunebench.runners.local import LocalRunner
from tunebench.tuning.database import Database, provenance
from tunebench.tuning.tuner import Options, tune

# Activations are rounded to 10 (float16) or 7 (bfloat16) bits after each kernel, a dozen times on the way to the
# logits, where transformers keeps float32; a wrong kernel is off by about 1.
HALF = {"float32": FLOAT32, "float16": 1e-2, "bfloat16": 8e-2}
INT8 = 2e-1  # seven bits of each activation, a scale to 32 of them, and rows of 64 that average little of it out
SCHEMES = ("q0f16", "q0bf16", "q4f16_0", "q4f16_1", "q4f32_1", "q8f16_1", "q4i8f16_0", "q8i8f16_0", "q3f16_1") + (
    "q4_1f16", "q4_kf16", "q6_kf16", "q4_1i8f16", "q6_ki8f16", "w4a16", "w8a8", "fp8f16", "nvfp4f16")  # fmt: skip
"""One of each family; `test_products` has all of them."""


def hugging_face(kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A llama with random weights, norms included, large enough that every part of it shows in the logits."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**LLAMA, "num_key_value_heads": kv_heads, "initializer_range": 0.2})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[LlamaForCausalLM, Path, Path]]:
    """(model, its safetensors' folder, its config), made once for each number of KV heads."""
    made: dict[int, tuple[LlamaForCausalLM, Path, Path]] = {}

    def get(kv_heads: int = 2) -> tuple[LlamaForCausalLM, Path, Path]:
        if kv_heads not in made:
            folder = tmp_path_factory.mktemp(f"llama-{kv_heads}")
            model = hugging_face(kv_heads)
            model.save_pretrained(folder)
            made[kv_heads] = model, folder, write_config(folder, num_key_value_heads=kv_heads)
        return made[kv_heads]

    return get


@pytest.mark.parametrize("how", ["sharded", "bfloat16"])
def test_every_way_to_save_is_read(
    how: str, target: tvm.target.Target, saved: Callable[..., tuple], tmp_path: Path
) -> None:
    reference, _, config = saved()
    if how == "sharded":
        reference.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        hugging_face().to(torch.bfloat16).save_pretrained(tmp_path)
        reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert compare(build_engine(load_model(config, "q0f32"), tmp_path, target), reference) < FLOAT32


def dequantized(model: Model, reference: LlamaForCausalLM) -> LlamaForCausalLM:
    """The reference with the weights that the scheme holds."""
    state = reference.state_dict()
    for matrix in model.matrices.values():
        weight = model.scheme_of(matrix).weight
        kind = quantization.kind_of(weight)
        for source in matrix.sources:
            parts = kind.quantize(weight, state[source].numpy())
            state[source] = torch.from_numpy(kind.dequantize(weight, parts)[:, : matrix.k])
    if model.workload.scheme.dtype != "float32":
        dtype = getattr(torch, model.workload.scheme.dtype)
        state = {name: value.to(dtype).float() if "norm" in name else value for name, value in state.items()}
    held = LlamaForCausalLM(reference.config).eval()
    held.load_state_dict(state)
    return held


@pytest.mark.parametrize("schedule", ["default", 3])
@pytest.mark.parametrize("name", [*SCHEMES, *ASYMMETRIC])
def test_a_scheme_computes_with_the_weights_it_holds(
    name: str, schedule: str | int, target: tvm.target.Target, saved: Callable[..., tuple]
) -> None:
    reference, folder, config = saved()
    model = load_model(config, ASYMMETRIC.get(name, name))
    records = random_schedules(target, schedule) if isinstance(schedule, int) else None
    engine = build_engine(model, folder, target, records)
    scheme = model.workload.scheme
    bound = HALF[scheme.dtype] if scheme.activations == "float" else INT8
    assert compare(engine, dequantized(model, reference)) < bound


def test_a_real_tuning_run_keeps_the_logits(
    target: tvm.target.Target, saved: Callable[..., tuple], tmp_path: Path, small_caches: None
) -> None:
    reference, folder, config = saved()
    model = load_model(config, "q0f32")
    mod, found = lower(model, target)
    database = Database(tmp_path / "db", provenance(target, cpu_device(), 2))
    largest = sorted(found, key=lambda task: task.name.startswith(("matmul", "fused_matmul")))[-6:]
    options = Options(trials=4, time_limit_s=8, threads=2, cold_bytes=1 << 15)
    tune(largest, database, target, lambda: LocalRunner(target, 2, 2), options, lambda progress: None)
    records = database.promoted()
    assert set(records) == {key for key, entry in database.entries.items() if entry.decision == "promoted"}
    compiled = compile_model(mod, target, records)
    assert compiled.tuned == dict.fromkeys(records, "tuned")
    engine = TvmEngine(
        model, compiled.executable, load(model, weights.read(model, sources.open_weights(folder)), tvm.cpu()), tvm.cpu()
    )
    assert compare(engine, reference) < FLOAT32


def test_weights_are_missing_or_of_another_shape(saved: Callable[..., tuple], tmp_path: Path) -> None:
    _, folder, _ = saved()
    larger = load_model(write_config(tmp_path, intermediate_size=128), "q0f32")
    with pytest.raises(TuneBenchError, match=r"down_proj.weight .* \[64, 96\], not \[64, 128\]"):
        read_all(larger, folder)
    deeper = load_model(write_config(tmp_path, num_hidden_layers=3), "q0f32")
    with pytest.raises(TuneBenchError, match=r"lacks model\.layers\.2\."):
        read_all(deeper, folder)
    with pytest.raises(TuneBenchError, match="safetensors"):
        read_all(deeper, tmp_path / "nowhere")


def read_all(model: Model, folder: Path) -> list[tuple[str, np.ndarray]]:
    """Every weight."""
    return list(weights.read(model, sources.open_weights(folder)))


def check_stacked(found: Iterable[tuple[str, np.ndarray]], model: Model) -> None:
    """Every array has its parameter's shape and dtype."""
    declared = model.param_shapes
    held = {name: (array.shape, str(array.dtype)) for name, array in found}
    assert held == declared


@pytest.mark.parametrize("name", sorted(quantization.schemes()))
def test_what_is_read_has_the_declared_shapes(name: str, saved: Callable[..., tuple]) -> None:
    _, folder, config = saved()
    model = load_model(config, name)
    check_stacked(read_all(model, folder), model)


def test_records_of_another_task_are_not_used(target: tvm.target.Target, saved: Callable[..., tuple]) -> None:
    _, _, config = saved()
    mod, found = lower(load_model(config, "q0f32"), target)
    schedule = begin_search(found[0], target).context.generate_design_space()[0]
    compiled = compile_model(mod, target, {"0": record_of(found[0], schedule, target)})
    assert not compiled.tuned
