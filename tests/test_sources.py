"""What -m names: a model of our own, a config, a folder, a .gguf, a hub id that was fetched before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LLAMA, load_model
from safetensors.numpy import save
from test_checkpoints import tiny_gguf
from test_fuzz import tiny_weights

from tunebench.errors import TuneBenchError
from tunebench.model import sources, weights
from tunebench.model.sources import find

COMMIT = "0a" * 20
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub id's files in Hugging Face's cache, as `hf download` leaves them."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    home = tmp_path / "hub" / "models--org--Some-1b"
    folder, blobs = home / "snapshots" / COMMIT, home / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for name, data in {"config.json": json.dumps(LLAMA).encode(), FILE: tiny_weights()}.items():
        (blobs / name).write_bytes(data)
        (folder / name).symlink_to(f"../../blobs/{name}")
    return folder


def test_a_hub_id_is_found_where_it_was_fetched_to(snapshot: Path) -> None:
    source = find("org/Some-1b")
    assert (source.name, source.weights) == ("Some-1b", snapshot)
    opened = source.open()
    assert opened
    assert "model.norm.weight" in opened.tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / FILE).unlink(), r"incomplete: it has no \*.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "incomplete: it has no config.json"),
        (lambda folder: (folder / FILE).resolve().unlink(), "incomplete: .*is no file in"),
        (
            lambda folder: (folder / INDEX).write_text(
                json.dumps({"weight_map": {"a": FILE, "b": "model-2.safetensors"}})
            ),
            "incomplete: 'model-2.safetensors' is no file",
        ),
        (lambda folder: (folder.parent.parent / "refs" / "main").write_text("../../.."), "incomplete"),
        (
            lambda folder: (folder.parent.parent / "refs" / "main").unlink(),
            "neither a file nor in Hugging Face's cache",
        ),
    ],
)
def test_what_was_not_fetched_whole_is_said_with_the_command(
    change: Callable[[Path], object], words: str, snapshot: Path
) -> None:
    change(snapshot)
    with pytest.raises(TuneBenchError, match=words) as caught:
        find("org/Some-1b")
    assert caught.value.hint == "Fetch it: hf download org/Some-1b"


@pytest.mark.parametrize("name", ["org/never", "demo/../demo", "a/b/c", "Llama-7b", "no\0name/x", "x" * 5000])
def test_what_is_nothing_is_refused(name: str, snapshot: Path) -> None:
    with pytest.raises(TuneBenchError, match=r"neither a file nor in|unknown model"):
        find(name)


def test_a_folder_brings_its_weights_and_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert (find(str(folder)).name, find(str(folder)).weights) == ("mine", None)
    (folder / FILE).write_bytes(tiny_weights())
    model = load_model(folder, "q0f32")
    assert (model.name, model.source and model.source.weights) == ("mine", folder)
    assert weights.are_real(model, "")
    assert not weights.are_real(model, "random")
    assert load_model(folder / "config.json", "q0f32").checkpoint is None


def test_a_gguf_brings_all(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "Tiny-1b-Q8_0.gguf", {"": "Q8_0"})
    model = load_model(path, "q0f32")
    assert (model.name, model.config.hidden_size) == ("Tiny-1b", 256)
    stored = dict(weights.load(model, "", 0))
    assert stored.keys() == model.param_shapes.keys()
    assert find(str(path)).open() is find(str(path)).open()  # parsed once
    with pytest.raises(TuneBenchError, match=r"cannot read .*none\.gguf"):
        find(str(tmp_path / "none.gguf"))
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(TuneBenchError, match="no model config at"):
        find(str(tmp_path / "folder.gguf"))


def test_weights_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1, "vocab_size": 64}))
    model = load_model(tmp_path / "tiny.json", "q0f32")
    assert not weights.are_real(model, "")
    (tmp_path / FILE).write_bytes(tiny_weights())
    assert weights.are_real(model, str(tmp_path))
    assert dict(weights.load(model, str(tmp_path), 0)).keys() == model.param_shapes.keys()
    made_up = dict(weights.load(model, "random", 0))["lm_head.weight"]
    assert made_up.std() > 0


def test_a_folder_whose_weights_are_in_no_known_form_runs_with_random_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {"quant_method": "other"}}))
    (tmp_path / FILE).write_bytes(save({}))
    model = load_model(tmp_path, "q4f16_1")
    assert dict(weights.load(model, "random", 0)).keys() == model.param_shapes.keys()
    with pytest.raises(TuneBenchError, match="quantized as 'other'"):
        weights.load(model, "", 0)


def test_models_of_our_own_have_no_weights() -> None:
    assert find("demo").open() is None
    assert "demo" in sources.names()
