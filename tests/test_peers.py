"""Peers compute what transformers does, for every architecture, on weights that went through ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import CONTEXT, THREADS, relative_error

from tunebench.engines import baselines
from tunebench.model import architectures, quantization, weights
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.spec import Workload

CASES = [(name, i) for name, each in architectures.architectures().items() for i in range(len(each.tiny))]
SERVED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2": {"layer_types": None, "use_sliding_window": False},
}
"""What llama.cpp needs to be otherwise in a tiny config."""
TOKENS = 40
PROMPT = 31


def write_tiny(folder: Path, name: str, place: int) -> Any:
    """A random model of transformers in a folder, as Hugging Face stores one."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    tiny = json.loads(msgspec.json.encode(architectures.architectures()[name].tiny[place]))
    given = {key: value for key, value in tiny.items() if value is not None} | {"pad_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **given)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which begin as zeros and ones
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**given, "model_type": name}))
    return model


@pytest.mark.parametrize("peer", ["torch", "llama_cpp"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_peer_computes_what_transformers_does(peer: str, name: str, place: int, tmp_path: Path) -> None:
    import torch

    reference = write_tiny(tmp_path, name, place)
    model = workloads.load_model(
        Workload(str(tmp_path), quantization.schemes()["q0f32"], 1, chunks=(16,), context=CONTEXT)
    )
    known = baselines.peers()[peer]
    reason = known.refuses(model)
    if reason:
        pytest.skip(reason)
    engine = known.load(model, weights.read(model, tmp_path), THREADS, tmp_path)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, TOKENS), np.int32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long()).logits[0].numpy()
    engine.prefill(tokens[:, :PROMPT], 0)
    assert relative_error(engine.logits(), expected[None, PROMPT - 1]) < 1e-3
    for i in range(PROMPT, TOKENS):
        engine.decode(tokens[:, i : i + 1], i)
    assert relative_error(engine.logits(), expected[None, -1]) < 1e-3
