"""Every workload is a complete Hugging Face config of the model that it names, and what is none is refused in words."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA, load_model, write_config
from tvm import tirx

from tunebench.errors import NOT_TEXT, TuneBenchError
from tunebench.model import architectures, quantization, sources
from tunebench.model import workload as workloads
from tunebench.spec import Workload

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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama", "hidden_size": "wide", "vocab_size": None}, "unknown model_type 'lama'"),
        ({"hidden_size": None, "vocab_size": None}, "hidden_size, vocab_size missing"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: Expected `int` >= 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: Expected `float` > 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: Expected `bool`"),
        ({"num_key_value_heads": 3}, "num_key_value_heads does not divide"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "scaled rotary embedding"),
        ({"rope_scaling": "linear"}, "scaled rotary embedding"),
        ({"hidden_act": "gelu"}, "another activation"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: Expected `int` <= 1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Expected `int` >= 1"),
        ({"hidden_size": True}, "hidden_size: Expected `int`, got `bool`"),
        ({"hidden_size": "64"}, "hidden_size: Expected `int`, got `str`"),
        ({"vocab_size": [128]}, "vocab_size: Expected `int`"),
        ({"rope_theta": float("nan")}, "rope_theta: Expected `float` > 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Expected `float` <= "),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": {}}}, "rope_theta"),
        ({"num_attention_heads": 96, "num_key_value_heads": 96, "head_dim": None}, "head_dim 0"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match=words):
        load_model(write_config(tmp_path, **changes), "q0f32")


def test_what_a_config_leaves_out(tmp_path: Path) -> None:
    short = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rope_theta")}
    (tmp_path / "short.json").write_text(json.dumps({**short, "head_dim": None, "rope_parameters": {"rope_theta": 5}}))
    config = load_model(tmp_path / "short.json", "q0f32").config
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 5.0)


@pytest.mark.parametrize("name", architectures.architectures())
@pytest.mark.parametrize("device_kind", ["cpu", "gpu"])
def test_an_architecture_names_what_its_module_takes(name: str, device_kind: str) -> None:
    architecture = architectures.architectures()[name]
    workload = Workload("tiny", quantization.schemes()["q4f16_1"], 1, (16,), 64, device_kind)
    model = workloads.Model(workload, architecture.tiny[0], architecture, "tiny")
    parts = {full for full in model.param_shapes if full not in model.vectors}
    assert {full.rpartition(".")[0] for full in parts} == set(model.matrices)
    assert all(model.param_shapes[name][0] == (vector.length,) for name, vector in model.vectors.items())
    assert sum(matrix.is_table for matrix in model.matrices.values()) == 1
    mod = workloads.build_module(model)
    assert {"decode", "prefill_16"} <= {gv.name_hint for gv in mod.get_global_vars()}
    assert any(isinstance(func, tirx.PrimFunc) for func in mod.functions.values())


@pytest.mark.parametrize(
    ("place", "changes", "name"),
    [
        ("mine/config.json", {"_name_or_path": "meta/Base"}, "mine"),
        ("mine", {}, "mine"),  # the folder
        ("other.json", {}, "other"),
        (f"{'0a' * 20}/config.json", {"_name_or_path": "meta/Base-7b/"}, "Base-7b"),  # a commit's folder
        (f"{'0a' * 20}/config.json", {}, "llama"),
    ],
)
def test_a_model_is_named_by_its_folder_or_its_own_name(
    place: str, changes: dict[str, object], name: str, tmp_path: Path
) -> None:
    """Every Hugging Face config is called config.json: the second one replaced the first in a report."""
    path = tmp_path / place
    file = path if path.suffix else path / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**LLAMA, **changes}))
    assert load_model(path, "q0f32").name == name


def test_models_that_compute_the_same_have_one_id(tmp_path: Path) -> None:
    same: list[dict[str, object]] = [
        {},
        {"max_position_embeddings": 4096, "use_cache": True},
        {"head_dim": None},
    ]
    others: list[dict[str, object]] = [{"rope_theta": 5e5}, {"num_hidden_layers": 3}, {"rms_norm_eps": 1e-6}]
    ids = [load_model(write_config(tmp_path, **changes), "q0f32").model_id for changes in same + others]
    assert len(set(ids[: len(same)])) == 1
    assert len(set(ids)) == 1 + len(others)
    assert all(re.fullmatch(r"[0-9a-f]{12}", each) for each in ids)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "llama", "x": ' + "[" * 100_000, "nested too deeply"),
        ('{"model_type": "llama", "x": ' + "9" * 5000 + "}", "5,000 digits"),
        ('{"model_type": "llama", "model_type": "llama"}', "'model_type' stands twice"),
        ("", "not JSON"),
        ('{"model_type": "\\ud800"}', "unknown model_type"),
        ("\x00", "not JSON"),
    ],
)
def test_a_file_that_is_no_config_says_why(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TuneBenchError, match=words) as caught:
        load_model(path, "q0f32")
    assert NOT_TEXT.search(str(caught.value)) is None


def test_a_folder_a_pipe_and_a_huge_file_are_no_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(TuneBenchError, match="no model config at"):
        load_model(tmp_path / "folder.json", "q0f32")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(TuneBenchError, match="it is no file"):
        load_model(tmp_path / "pipe.json", "q0f32")
    monkeypatch.setattr(sources, "CONFIG_BYTES", 100)
    with pytest.raises(TuneBenchError, match="larger than"):
        load_model(write_config(tmp_path), "q0f32")
