"""Other engines compute what ours does, on the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tvm
from conftest import THREADS, load_model, lower, relative_error, write_config

from tunebench.compile.build import compile_model
from tunebench.engines import baselines, gguf_blocks
from tunebench.engines.baselines import Engine, llama_cpp
from tunebench.engines.tvm import TvmEngine
from tunebench.engines.tvm import load as load_tvm
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model import workload as workloads
from tunebench.model.workload import Model

LOGITS = {"q0f32": 2e-3, "q0f16": 2e-2, "q0bf16": 5e-2, "q4f16_1": 5e-2, "q4i8f16_0": 3e-2, "q8i8f16_0": 3e-2}
"""How far the logits may be off, of the largest: llama.cpp quantizes activations and keeps a cache in float16."""
CASES = [("llama_cpp", name) for name in LOGITS] + [("torch", name) for name in LOGITS if name.startswith("q0")]


WITHOUT_BLOCKS = {"q3f16_1", "q4f32_1", "w4a16_asym", "fp8f16", "fp8f16_128", "nvfp4f16"}
"""Schemes that no type of ggml holds without loss."""


def open_peer(peer: str, model: Model, folder: Path) -> Engine:
    known = baselines.peers()[peer]
    missing = [name for name in known.packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")
    return known.load(model, workloads.random_weights(model, 0), THREADS, folder)


def own_engine(model: Model, target: tvm.target.Target) -> TvmEngine:
    mod, _ = lower(model, target)
    loaded = load_tvm(model, workloads.random_weights(model, 0), tvm.cpu())
    return TvmEngine(model, compile_model(mod, target, {}).executable, loaded, tvm.cpu())


def steps(engine: Engine, model: Model) -> list[np.ndarray]:
    """Logits of a prompt, two decode steps, and a second prompt further back, over what is there."""
    load = model.workload
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (load.batch, 30), np.int32)
    found = []
    engine.prefill(tokens[:, :21], 0)
    found.append(engine.logits())
    for i in (21, 22):
        engine.decode(tokens[:, i : i + 1], i)
        found.append(engine.logits())
    engine.prefill(tokens[:, 23:], 11)
    return [*found, engine.logits()]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("peer", "scheme"), CASES)
def test_a_peer_computes_the_same(
    peer: str, scheme: str, batch: int, tmp_path: Path, target: tvm.target.Target
) -> None:
    model = load_model(write_config(tmp_path, head_dim=32), scheme, batch)
    engine = open_peer(peer, model, tmp_path)
    for found, expected in zip(steps(engine, model), steps(own_engine(model, target), model), strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) < LOGITS[scheme]
    assert engine.weight_bytes > 0
    assert not list(tmp_path.glob("gguf-*"))


@pytest.mark.parametrize("name", quantization.schemes())
def test_blocks_of_gguf_hold_the_weights_exactly(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    form = quantization.schemes()[name].weight
    kind = gguf_blocks.type_of(form, 512)
    assert (kind == "") == (name in WITHOUT_BLOCKS)
    if kind in ("", "F32", "F16", "BF16"):
        return
    matrix = np.random.default_rng(2).standard_normal((48, 512)).astype(np.float32)
    stored = quantization.kind_of(form).quantize(quantization.by_rows(form), matrix)
    parts = quantization.kind_of(form).laid_out(form, stored)
    expected = quantization.kind_of(form).dequantize(form, parts)
    blocks = np.concatenate(list(gguf_blocks.blocks(form, parts, np.arange(48)[::-1])))
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])[::-1]
    np.testing.assert_array_equal(found, expected[:48])


def test_a_missing_package_says_what_to_install() -> None:
    peer = baselines.Peer("other", "", ("no_such_package",), lambda model: "", llama_cpp.load)
    with pytest.raises(TuneBenchError, match=r"other needs no_such_package.*\[peers\]'$"):
        baselines.check_installed(peer)


def test_torch_says_which_schemes_it_has(config: Path) -> None:
    assert "q0bf16" in baselines.peers()["torch"].refuses(load_model(config, "q4f16_1"))
