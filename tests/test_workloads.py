"""Every workload is a complete Hugging Face config of the model that it names."""

import json
from pathlib import Path
from typing import Any

import pytest

WORKLOADS = sorted((Path(__file__).parent.parent / "workloads").glob("*.json"))

FIELDS: dict[str, type] = {
    "architectures": list,
    "model_type": str,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "max_position_embeddings": int,
    "tie_word_embeddings": bool,
    "hidden_act": str,
    "torch_dtype": str,
}

PARAMETERS = {  # as published with the weights; the demo model is our own
    "demo": 56_369_664,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "vicuna-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
}


@pytest.fixture(params=WORKLOADS, ids=lambda path: path.stem)
def workload(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_the_published_models_are_there() -> None:
    assert set(PARAMETERS) <= {path.stem for path in WORKLOADS}


def test_fields(workload: Path) -> None:
    config = json.loads(workload.read_text())
    wrong = {name for name, kind in FIELDS.items() if type(config.get(name)) is not kind}
    assert not wrong


def test_heads_divide(workload: Path) -> None:
    config = json.loads(workload.read_text())
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["hidden_size"] % 32 == 0
    assert config["intermediate_size"] % 32 == 0


def test_parameter_count(workload: Path) -> None:
    if workload.stem not in PARAMETERS:
        pytest.skip("no published count is recorded")
    assert _parameters(json.loads(workload.read_text())) == pytest.approx(PARAMETERS[workload.stem], rel=0.01)


def _parameters(config: dict[str, Any]) -> int:
    """Weights of a Llama: embedding and head, and per layer the projections, the MLP and two norms."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    attention = 2 * hidden * query + 2 * hidden * key_value
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    return int(embeddings + config["num_hidden_layers"] * layer + hidden)
