"""Peers compute what transformers does, for every architecture, on weights that went through ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import THREADS, load_model
from gguf import GGUFReader
from gguf.quants import dequantize
from test_architectures import CASES, FLOAT32, compare, random_model
from transformers import PreTrainedModel

from tunebench.engines import baselines, gguf_file, torch_tensors
from tunebench.model import quantization, weights
from tunebench.model import workload as workloads

YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 32}
CACHED = [case for case in CASES if case[0] != "qwen3_next"]
"""Those that no peer lacks altogether: its states of linear attention are TuneBench's alone."""
SERVED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"rope_parameters": YARN},
    "gemma2": {"query_pre_attn_scalar": 32},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True},
    "qwen2": {"layer_types": None, "use_sliding_window": False},
}
"""What a tiny config may not say for llama.cpp to compute it."""
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.25},
}
"""Parameters of rotations by their kind."""
GELU = 5e-3
"""How far llama.cpp may be off where it looks a GELU up in a table of float16."""


Saved = tuple[PreTrainedModel, Path]


def save(folder: Path, name: str, place: int = 0, **changes: Any) -> Saved:
    """A tiny model of transformers, and the folder that it is saved in."""
    model = random_model(name, place, **changes)
    model.save_pretrained(folder)
    return model, folder


def peer_error(peer: str, saved: Saved, batch: int) -> float:
    """The largest relative error of logits."""
    reference, folder = saved
    model = load_model(folder, "q0f32", batch)
    known = baselines.peers()[peer]
    assert not known.refuses(model)
    return compare(known.load(model, weights.read(model, model.checkpoint), THREADS, folder), reference, batch)


@pytest.mark.parametrize(("name", "place"), CACHED)
def test_torch_computes_what_transformers_does(name: str, place: int, tmp_path: Path) -> None:
    assert peer_error("torch", save(tmp_path, name, place), 2) < FLOAT32


@pytest.mark.parametrize("name", quantization.schemes())
@pytest.mark.parametrize("ordered", [False, True])
def test_torch_dequantizes_bit_for_bit(name: str, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tensors, "BLOCK", 1 << 10)
    form = quantization.schemes()[name].weight
    form = replace(form, ordered=ordered and form.kind == "integer")
    kind, n, k = quantization.kind_of(form), 200, 512
    matrix = np.random.default_rng(0).standard_normal((n, k), np.float32)
    parts = kind.quantize(form, matrix)
    for dtype in (torch.float32, torch.float16):
        found = torch_tensors.dequantized(form, parts, n, k, dtype, "cpu")
        expected = kind.dequantize(form, parts)[:n, :k].astype(np.float32)
        assert torch.equal(found, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize(("name", "place"), CACHED)
def test_llama_cpp_computes_what_transformers_does(name: str, place: int, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    error = peer_error("llama_cpp", save(tmp_path, name, place, **SERVED.get(name, {})), 2)
    assert error < (GELU if name.startswith(("gemma", "gpt_neox")) else FLOAT32)


def test_a_file_has_each_expert_in_its_place(tmp_path: Path) -> None:
    model, path = load_model(save(tmp_path, "mixtral")[1], "q4f16_1"), tmp_path / "model.gguf"
    gguf_file.write(model, workloads.random_weights(model, 0), path)
    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    experts, made = model.decoder.layers[0].mlp, dict(workloads.random_weights(model, 0))
    form = model.scheme_of(experts.up).weight
    parts = {suffix: made[f"{experts.up.name}.{suffix}"] for suffix in ("q_weight", "q_scale")}
    floats = quantization.kind_of(form).dequantize(form, parts).reshape(experts.router.n, 2, -1, experts.up.k)
    for i, name in enumerate(("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")):
        found = dequantize(held[name].data, held[name].tensor_type)
        np.testing.assert_array_equal(found, floats[:, i])


def test_llama_cpp_runs_the_file_that_a_model_came_in(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    reference, folder = save(tmp_path, "llama")
    model, path = load_model(folder, "q0f32"), tmp_path / "tiny.gguf"
    gguf_file.write(model, weights.read(model, model.checkpoint), path)
    held = load_model(path, replace(quantization.schemes()["q0f32"], native=True))
    engine = baselines.peers()["llama_cpp"].load(held, [], THREADS, tmp_path / "not needed")
    assert compare(engine, reference, 1) < FLOAT32
    assert engine.weight_bytes == sum(tensor.n_bytes for tensor in GGUFReader(path).tensors)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3_next", "not written for qwen3_next"),
        ("mistral", "sliding window"),
        ("qwen2", "sliding window"),
        ("gemma2", "scale of scores"),
        ("qwen3_moe", "layers of which some have experts and mixture whose weights do not add up to 1"),
    ],
)
def test_what_llama_cpp_lacks_is_said(name: str, why: str, tmp_path: Path) -> None:
    model = load_model(save(tmp_path, name)[1], "q0f32")
    assert why in baselines.peers()["llama_cpp"].refuses(model)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "linear"), ("llama", "llama3"), ("llama", "yarn"), ("qwen3", "linear"), ("qwen3", "yarn")],
)
def test_llama_cpp_rotates_as_transformers_does(name: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    assert peer_error("llama_cpp", save(tmp_path, name, **scaled(kind)), 1) < FLOAT32


def test_a_rotation_that_llama_cpp_lacks_is_said(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, "qwen3", **scaled("llama3"))[1], "q0f32")
    assert "llama.cpp's qwen3 lacks this model's scaled rotation" in baselines.peers()["llama_cpp"].refuses(model)


def scaled(kind: str) -> dict[str, Any]:
    """A change of a tiny config."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}}
