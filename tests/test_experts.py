"""The kernels of mixtures of experts against numpy, under default and random schedules, and as source for GPUs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import tvm
from conftest import cpu_target, draw_designs, load_model, lower, record_of
from safetensors.torch import load_file, save_file
from test_architectures import config_dict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tunebench.compile import check, in_float64, passes
from tunebench.compile.tasks import Task, replay
from tunebench.devices.targets import find
from tunebench.kernels import cpu_experts, experts, gpu_experts
from tunebench.kernels.operation import Combine, ExpertMatmul, Group, Operation, Route, parse
from tunebench.model import architectures, native, quantization, sources, weights
from tunebench.model.workload import Model
from tunebench.runners.bench import distance, random_inputs, too_far, written
from tunebench.spec import Scheme, WeightFormat

TOKENS, COUNT, PER_TOKEN, N, K = 6, 4, 2, 48, 64
FORMATS = {
    "float": WeightFormat("float", 32, "float32"),
    "symmetric": WeightFormat("integer", 4, "float32", 32),
    "bytes": WeightFormat("integer", 8, "float32", 32),
    "minimum": WeightFormat("integer", 4, "float32", 32, "minimum"),
    "zero point": WeightFormat("integer", 4, "float32", 32, "zero_point"),
    "super groups": WeightFormat("integer", 4, "float32", 32, "minimum", super_group=64),
    "codes": WeightFormat("codes", 4, "float8_e8m0fnu", 32, code="float4_e2m1fn"),
}
CHOICES = {
    "spread": [[0, 1], [2, 3], [1, 0], [3, 0], [2, 1], [0, 3]],
    "one gets all, one gets nothing": [[1, 0], [1, 2], [1, 0], [1, 2], [1, 0], [1, 2]],
}


def product(weight: WeightFormat, tile: int, share: int, bias: bool = False, gpu: bool = False) -> tvm.tirx.PrimFunc:
    """The kernel of a product of six tokens' experts."""
    op = ExpertMatmul(TOKENS * PER_TOKEN, COUNT, PER_TOKEN, N, K, share, "float32", weight, tile, bias)
    kind = quantization.kind_of(weight)
    parts = [(suffix, *shape) for suffix, shape in kind.shapes(weight, COUNT * N, K).items()]
    make = gpu_experts.expert_matmul if gpu else cpu_experts.expert_matmul
    return make(op, parts, functools.partial(kind.weights, weight))


def run(func: tvm.tirx.PrimFunc, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """All arguments after a run under the CPU's default schedule."""
    target = cpu_target()
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    tvm.compile(passes.default_schedule(passes.task_module(func), target), target=target)["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


@pytest.mark.parametrize("normalized", [True, False])
def test_a_token_goes_to_its_experts_of_the_highest_scores(normalized: bool) -> None:
    scores = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    scores[1] = 0.5  # all equal: the lower numbers first
    scores[2, [3, 6]] = 9
    _, chosen, parts = run(
        experts.route(Route(5, 8, 3, normalized)), [scores, np.zeros((5, 3), np.int32), np.zeros((5, 3), np.float32)]
    )
    expected = np.argsort(-scores, kind="stable", axis=1)[:, :3]
    shares = np.exp(scores - scores.max(1, keepdims=True))
    total = np.take_along_axis(shares, expected, 1).sum(1) if normalized else shares.sum(1)
    np.testing.assert_array_equal(chosen, expected)
    np.testing.assert_allclose(parts, np.take_along_axis(shares, expected, 1) / total[:, None], rtol=1e-5)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("tile", [2, 4])
def test_slots_are_grouped_by_expert(choices: list[list[int]], tile: int) -> None:
    chosen, op = np.array(choices, np.int32), Group(TOKENS, COUNT, PER_TOKEN, tile)
    empty = [np.full(extent, -1, np.int32) for extent in (op.tiles * tile, op.tiles, 1)]
    _, order, of_tile, used = run(experts.group(op), [chosen, *empty])
    assert used[0] == sum(-(-np.count_nonzero(chosen == expert) // tile) for expert in range(COUNT)) <= op.tiles
    assert set(order[: used[0] * tile]) == set(range(op.slots))
    np.testing.assert_array_equal(chosen.reshape(-1)[order.reshape(-1, tile)], np.repeat(of_tile[:, None], tile, 1))
    for name, found in zip(("order", "experts", "used"), (order, of_tile, used), strict=True):
        np.testing.assert_array_equal(found, experts.places(op, chosen)[name])


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize("weight", FORMATS.values(), ids=FORMATS)
def test_each_slot_is_multiplied_with_its_expert(
    weight: WeightFormat, tile: int, choices: list[list[int]], gpu: bool
) -> None:
    rng, kind = np.random.default_rng(0), quantization.kind_of(weight)
    parts = kind.quantize(weight, rng.standard_normal((COUNT * N, K)).astype(np.float32))
    by_expert = kind.dequantize(weight, parts).reshape(COUNT, N, K)
    chosen, bias = np.array(choices, np.int32), rng.standard_normal(COUNT * N).astype(np.float32)
    indices: Mapping[str, np.ndarray] = {"chosen": chosen}
    if tile:
        indices = experts.places(Group(TOKENS, COUNT, PER_TOKEN, tile), chosen)
    for share in (1, PER_TOKEN):
        x = rng.standard_normal((TOKENS * PER_TOKEN // share, K)).astype(np.float32)
        out = np.full((TOKENS * PER_TOKEN, N), np.nan, np.float32)
        found = run(product(weight, tile, share, True, gpu), [x, *indices.values(), *parts.values(), bias, out])[-1]
        for slot, expert in enumerate(chosen.reshape(-1)):
            expected = by_expert[expert] @ x[slot // share] + bias.reshape(COUNT, N)[expert]
            np.testing.assert_allclose(found[slot], expected, rtol=1e-4, atol=1e-4)


def test_results_are_weighted_and_added_up() -> None:
    rng = np.random.default_rng(0)
    y, residual = rng.standard_normal((10, 48)).astype(np.float32), rng.standard_normal((5, 48)).astype(np.float32)
    weights = rng.uniform(0, 1, (5, 2)).astype(np.float32)
    found = run(experts.combine(Combine(5, 2, 48, "float32")), [y, weights, residual, np.zeros_like(residual)])[-1]
    np.testing.assert_allclose(
        found, residual + (y.reshape(5, 2, 48) * weights[..., None]).sum(1), rtol=1e-5, atol=1e-6
    )


CHOOSING = {
    "route": experts.route(Route(5, 8, 3, True)),
    "group": experts.group(Group(TOKENS, COUNT, PER_TOKEN, 4)),
    "combine": experts.combine(Combine(5, 2, 48, "float32")),
}
PRODUCTS = {
    f"{name} {tile or 'slots'}": product(weight, tile, 2, bias=True)
    for name, weight in FORMATS.items()
    for tile in (0, 4)
}


@pytest.mark.parametrize("name", [*CHOOSING, *PRODUCTS])
def test_every_design_computes_the_same(name: str) -> None:
    mod, target = passes.task_module({**CHOOSING, **PRODUCTS}[name]), cpu_target()
    arrays = random_inputs(mod, 0, np.random.default_rng(0))
    exact, task = in_float64.outputs(mod, arrays), Task("key", name, mod, {1: 1})
    designs = [design for seed in range(2) for design in draw_designs(task, target, seed)]
    assert any(design.trace.insts for design in designs)
    for design in designs:
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        tvm.compile(replay(mod, record_of(task, design, target)), target=target)["main"](*tensors)
        for i in written(mod):
            assert not too_far(*distance(tensors[i].numpy(), exact[i]), "float32")


@pytest.mark.parametrize("preset", ["nvidia/nvidia-h100", "webgpu", "opencl"])
def test_gpus_get_source(preset: str) -> None:
    target = passes.tvm_target(find(preset), 1)
    kernels = {**CHOOSING, **{str(tile): product(FORMATS["symmetric"], tile, 2, gpu=True) for tile in (0, 4)}}
    tasks = [Task(name, name, passes.task_module(func), {1: 1}) for name, func in kernels.items()]
    assert [built for built in check.build_all(tasks, target) if built.error] == []


def test_kernels_say_what_they_are() -> None:
    op = ExpertMatmul(12, COUNT, PER_TOKEN, N, K, 2, "float16", replace(FORMATS["minimum"], dtype="float16"), 4, True)
    each: list[Operation] = [op, op.group, Route(5, 8, 3, False), Combine(5, 2, 48, "float16")]
    assert [parse(op.text()) for op in each] == each


def test_a_kernel_reads_the_weights_of_chosen_experts_alone() -> None:
    one = ExpertMatmul(2, 8, 2, N, K, 2, "float32", FORMATS["float"])
    assert experts.touched(one) == pytest.approx(1 / 4)
    assert experts.touched(replace(one, slots=4)) == pytest.approx(1 - (3 / 4) ** 2)
    assert experts.touched(op=None) == 1


@pytest.mark.parametrize(
    ("rows", "count", "per_token", "tile"),
    [(1, 8, 2, 0), (4, 8, 2, 0), (16, 8, 2, 4), (128, 128, 8, 8), (2048, 8, 2, 16)],
)
def test_many_slots_an_expert_are_taken_in_tiles(rows: int, count: int, per_token: int, tile: int) -> None:
    assert experts.grouped_by(rows, count, per_token) == tile


def config_of(name: str, folder: Path, **changes: object) -> Path:
    """The config.json of an architecture's tiny model."""
    tiny = msgspec.to_builtins(architectures.architectures()[name].tiny[0])
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": name, **tiny, **changes}))
    return path


@pytest.mark.parametrize("scheme", ["q4f16_1", "q8f16_1", "q4f16_0", "q4i8f16_0", "mxfp4f16"])
def test_experts_are_stored_by_row_in_every_scheme(scheme: str, tmp_path: Path) -> None:
    """A scheme that multiplies bytes takes float activations for them."""
    model = load_model(config_of("mixtral", tmp_path), scheme, chunks=(16,))
    matrix = model.matrices["model.layers.0.block_sparse_moe.experts.down"]
    own = model.scheme_of(matrix)
    assert (own.weight.layout, own.activations) == ("NK", "float")
    assert model.scheme_of(model.matrices["model.layers.0.block_sparse_moe.gate"]).weight.kind == "float"
    tasks = {task.name: task for task in lower(model, cpu_target())[1]}
    assert {"route", "group", "combine"} <= {name.rstrip("0123456789_") for name in tasks}


def test_what_a_mixture_reads_and_multiplies_is_counted_by_expert(tmp_path: Path) -> None:
    path = config_of("mixtral", tmp_path, num_hidden_layers=1)
    one, four = load_model(path, "q0f32"), load_model(path, "q0f32", 4)
    experts_of = [matrix for matrix in one.matrices.values() if matrix.experts > 1]
    held = sum(matrix.n * matrix.k for matrix in experts_of)
    table = 128 * 64
    assert one.n_params - one.active_n_params == held // 2  # two of four
    assert one.weight_bytes - one.read_bytes == 4 * (table + held // 2)
    assert four.weight_bytes - four.read_bytes == 4 * (table + held // 16)  # expected of four tokens' choices
    body = sum(matrix.n * matrix.k for matrix in one.matrices.values()) - held - 2 * table
    assert one.flops_per_token == 2 * (body + held // 2)


def test_a_dense_model_is_all_active(tmp_path: Path) -> None:
    model = load_model(config_of("llama", tmp_path), "q0f32")
    assert model.active_n_params == model.n_params


def test_mxfp4_experts_are_read_as_they_are(tmp_path: Path) -> None:
    """Outputs of the gate and those that it multiplies come apart, as they do in floats, which lie transposed."""
    folder, rng = tmp_path / "whole", np.random.default_rng(0)
    tiny = config_dict(architectures.architectures()["gpt_oss"].tiny[0])
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **tiny)).save_pretrained(folder)
    plain, packed = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, k, n = plain[name].shape
        blocks = torch.from_numpy(rng.integers(0, 256, (count, n, k // 32, 16), np.uint8))
        scales = torch.from_numpy(rng.integers(119, 127, (count, n, k // 32), np.uint8))
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del packed[name]
    config = json.loads((folder / "config.json").read_text())
    for at, tensors in (("plain", plain), ("packed", packed)):
        (tmp_path / at).mkdir()
        save_file(tensors, tmp_path / at / "model.safetensors")
        method = {"quantization_config": {"quant_method": "mxfp4"}} if at == "packed" else {}
        (tmp_path / at / "config.json").write_text(json.dumps({**config, **method}))
    read = {at: _read(tmp_path / at, quantization.schemes()["q0f32"])[1] for at in ("plain", "packed")}
    assert read["plain"].keys() == read["packed"].keys()
    for name, array in read["plain"].items():
        np.testing.assert_array_equal(array, read["packed"][name])
    model, stored = _read(tmp_path / "packed", native.scheme("native", sources.open_weights(tmp_path / "packed")))
    matrix = model.matrices["model.layers.0.mlp.experts.gate_up_proj"]
    form = model.scheme_of(matrix).weight
    assert form.code == "float4_e2m1fn"
    parts = {suffix: stored[f"{matrix.name}.{suffix}"] for suffix in ("q_weight", "q_scale")}
    np.testing.assert_array_equal(
        quantization.kind_of(form).dequantize(form, parts), read["plain"][f"{matrix.name}.weight"]
    )


def _read(folder: Path, scheme: Scheme) -> tuple[Model, dict[str, np.ndarray]]:
    model = load_model(folder, scheme, chunks=(16,))
    return model, dict(weights.read(model, sources.open_weights(folder)))
