"""Every workload is a complete Hugging Face config of the model that it names, and what is none is refused in words."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import LLAMA, load_model, write_config
from tvm import tirx

from tunebench.errors import NOT_TEXT, TuneBenchError
from tunebench.model import architectures, quantization, sources
from tunebench.model import workload as workloads
from tunebench.model.description import one_of_each
from tunebench.spec import Workload

WORKLOADS = sorted((Path(__file__).parent.parent / "workloads").glob("*.json"))

PARAMETERS = {  # as published with the weights, of gemma-3-4b without its pictures' part; the demo model is our own
    "demo": 56_369_664,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "vicuna-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-3-4b": 3_880_263_168,
    "phi-3.5-mini": 3_821_079_552,
    "dolly-v2-3b": 2_775_086_080,
    "pythia-1b": 1_011_781_632,
    "gpt-oss-20b": 20_914_757_184,
}


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LINEAR = {"rope_type": "linear", "factor": 2}
LONGROPE = {"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}


@pytest.fixture(params=WORKLOADS, ids=lambda path: path.stem)
def workload(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def test_the_published_models_are_there() -> None:
    assert set(PARAMETERS) == {path.stem for path in WORKLOADS}


def test_a_workload_has_the_weights_that_were_published(workload: Path) -> None:
    data = json.loads(workload.read_text())
    model = load_model(workload, "q4f16_1")
    assert model.n_params == PARAMETERS[workload.stem]
    assert data["torch_dtype"] in ("float16", "bfloat16")
    assert all(type(name) is str for name in data["architectures"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama", "hidden_size": "wide", "vocab_size": None}, "unknown model_type 'lama'"),
        ({"hidden_size": None, "vocab_size": None}, "hidden_size, vocab_size missing"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: Expected `int` >= 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: Expected `float` > 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: Expected `bool`"),
        ({"num_key_value_heads": 3}, "num_key_value_heads does not divide"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_parameters are no object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor: Expected `float` >= 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mrope_section": [2]}}, "unknown field `mrope_section`"),
        ({"rope_scaling": LONGROPE}, "rope_scaling has 2 factors, not 8"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor is not above low_freq_factor"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"hidden_act": ["silu"]}, "hidden_act .* is not supported"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers: Expected `int` <= 1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: Expected `int` >= 1"),
        ({"hidden_size": True}, "hidden_size: Expected `int`, got `bool`"),
        ({"hidden_size": "64"}, "hidden_size: Expected `int`, got `str`"),
        ({"vocab_size": [128]}, "vocab_size: Expected `int`"),
        ({"rope_theta": float("nan")}, "rope_theta: Expected `float` > 1"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Expected `float` <= "),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": {}}}, "rope_theta"),
        ({"num_attention_heads": 96, "num_key_value_heads": 96, "head_dim": None}, "head_dim 0"),
        ({"rope_theta": 1.0}, "rope_theta: Expected `float` > 1"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "leaves no element"),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 5}}, "rope_parameters are no object"),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": LINEAR}}, "has a scaled rope"),
        ({"layer_types": 5}, "layer_types has 5"),
        ({"clip_qkv": 8.0}, "clip_qkv is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"layer_types": ["linear_attention"]}, "layer_types has linear_attention"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is not supported"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers of 2"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2}}, "not supported for phi3"),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma9"}}, "unknown model_type 'gemma9'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    path = write_config(tmp_path, **changes)
    with pytest.raises(TuneBenchError, match=words) as caught:
        load_model(path, "q0f32")
    assert str(path) in str(caught.value) or "unknown model_type" in words or "head_dim 0" in words


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"rope_theta": None, "rope_scaling": {}, "rope_parameters": None},
        {"torch_dtype": None, "dtype": "float32", "attention_bias": False, "clip_qkv": None, "layer_types": None},
        {"partial_rotary_factor": 1.0, "logits_scaling": 1, "layer_types": ["full_attention"] * 2},
    ],
)
def test_what_changes_nothing_is_read_as_nothing(changes: dict[str, object], tmp_path: Path) -> None:
    usual = load_model(write_config(tmp_path), "q0f32").config
    assert load_model(write_config(tmp_path, **changes), "q0f32").config == usual


def test_the_text_config_of_a_model_that_takes_pictures_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    text = {"num_hidden_layers": 1, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 5}}))
    model = load_model(path, "q0f32")
    assert (model.architecture.name, model.config.hidden_size, model.config.vocab_size) == ("gemma3_text", 2304, 262208)
    layer = model.decoder.layers[0]
    assert (layer.attention.window, layer.attention.rope) == (1024, 1)


def test_a_window_that_is_left_out_is_another_thing_than_none(tmp_path: Path) -> None:
    def window(**changes: object) -> int:
        return (
            load_model(write_config(tmp_path, model_type="mistral", **changes), "q0f32")
            .decoder.layers[0]
            .attention.window
        )

    assert (window(), window(sliding_window=None), window(sliding_window=32)) == (4096, 0, 32)


def test_the_first_layers_of_a_model(tmp_path: Path) -> None:
    path = write_config(tmp_path, model_type="qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1)
    whole, all_layers, first = (load_model(path, "q0f32", layers=layers) for layers in (0, 2, 1))
    assert [len(model.decoder.layers) for model in (whole, all_layers, first)] == [2, 2, 1]
    assert [model.workload.layers for model in (whole, all_layers, first)] == [0, 0, 1]
    assert whole.model_id == all_layers.model_id != first.model_id
    assert whole.cache_bytes == 2 * first.cache_bytes
    assert first.n_params < whole.n_params
    assert whole.cache_read_bytes(100) == first.cache_read_bytes(100) + first.cache_read_bytes(32)  # of the second
    assert len(one_of_each(whole.decoder.layers * 3)) == 2
    with pytest.raises(TuneBenchError, match="has 2 layers, not 3"):
        load_model(path, "q0f32", layers=3)


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


def test_ids_in_rows_that_were_written_long_ago() -> None:
    for name, model_id in (("llama-7b", "303591d0d55f"), ("llama-3-8b", "defabe7a9249")):
        assert load_model(Path(name), "q4f16_1").model_id == model_id


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
