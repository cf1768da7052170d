"""What is no model's weights, or lies outside their folder, is refused by name before it is used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from test_fuzz import TINY, tiny_weights

from tunebench.errors import TuneBenchError
from tunebench.model import sources, weights

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
Tensors = dict[str, np.ndarray]


def read(folder: Path) -> list[str]:
    """The names of all parameters."""
    return [name for name, _ in weights.read(TINY, sources.open_weights(folder))]


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "/dev/zero", "link", "", ".", "a\0b", "pipe", "loop"])
def test_an_index_leads_nowhere_else(name: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "weights", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / FILE).write_bytes(tiny_weights())
    (folder / "link").symlink_to(outside / FILE)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(TuneBenchError, match="is no file in"):
        read(folder)
    (folder / INDEX).unlink()
    (folder / FILE).symlink_to(outside / FILE)
    with pytest.raises(TuneBenchError, match="is no file in"):
        read(folder)


def test_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_bytes(tiny_weights())
    (folder / FILE).symlink_to("../../blobs/0123")
    assert NORM in read(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "b", "a": "c"}}',
        "[" * 9**5,
    ],
)
def test_a_damaged_index_is_said(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(TuneBenchError, match="is no index of weights"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found[NORM].__setitem__(3, np.nan), f"{NORM} .* not finite in float16"),
        (lambda found: found[DOWN].__setitem__((2, 2), np.inf), f"{DOWN} .* not finite"),
        (lambda found: found.update({NORM: np.full(64, 1e30)}), f"{NORM} .* not finite in float16"),
        (lambda found: found.update({DOWN: np.full((64, 96), 1e30)}), f"{DOWN} .* not finite"),
        (lambda found: found.update({NORM: np.ones(64, np.int32)}), f"{NORM} .* is I32, not F16"),
        (lambda found: found.update({NORM: np.ones((64, 1), np.float32)}), r"shape \[64, 1\], not \[64\]"),
        (lambda found: found.update({DOWN: np.ones((), np.float32)}), r"shape \[\], not \[64, 96\]"),
        (
            lambda found: found.update({DOWN.replace("down", "up"): np.ones((95, 64))}),
            r"\[96, 95\] rows, not 192 in all",
        ),
        (lambda found: found.pop(NORM), f"lacks {NORM}"),
    ],
)
def test_a_wrong_tensor_is_named(change: Callable[[Tensors], object], words: str, tmp_path: Path) -> None:
    found = {name: array.copy() for name, array in load(tiny_weights()).items()}
    change(found)
    (tmp_path / FILE).write_bytes(save(found))
    with pytest.raises(TuneBenchError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_file_cut_short_is_said(left: int, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(tiny_weights()[:left])
    with pytest.raises(TuneBenchError, match=r"cannot read .*Copy it again"):
        read(tmp_path)
