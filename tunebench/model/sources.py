"""Where models come from: a name in workloads/, a config.json, a folder, a .gguf, or Hugging Face's cache."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunebench import installation, registry, stored
from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import Checkpoint, gguf, safetensors

CONFIG_BYTES = 16 << 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_KEPT = 4  # files that stay open


@dataclass(frozen=True)
class Source:
    """A model that was found: how rows call it, its config, and where its weights are, if they are there at all."""

    name: str
    path: Path  # what errors name
    config: Mapping[str, Any]
    weights: Path | None = None

    def open(self) -> Checkpoint | None:
        """Its weights; None where it has none."""
        if self.weights is None:
            return None
        if self.weights.suffix == ".gguf":
            return open_gguf(self.weights)
        return safetensors.open_folder(self.weights, self.name, self.config)


def names() -> list[str]:
    """The models that come with TuneBench."""
    return sorted(path.stem for path in installation.workloads().glob("*.json"))


def find(model: str) -> Source:
    """What `-m` names; a TuneBenchError says what it is not, or what to fetch."""
    path = Path(model)
    if model in names():
        path = installation.workloads() / f"{model}.json"
    elif os.path.isdir(path):  # also False where the name is too long for a path
        return _in_folder(path)
    elif path.suffix == ".gguf":
        return _in_gguf(path)
    elif path.suffix != ".json":
        if HUB_ID.fullmatch(model):
            return _in_cache(model)
        raise registry.unknown(model, names(), "model")
    data = _read_json(path)
    return Source(_name(path, data), path, data)


def open_weights(path: Path) -> Checkpoint:
    """A folder of weights or a .gguf that another model's config is run with."""
    if path.suffix == ".gguf":
        return open_gguf(path)
    config = _read_json(path / "config.json") if (path / "config.json").exists() else {}
    return safetensors.open_folder(path, path.name, config)


def open_gguf(path: Path) -> Checkpoint:
    """A .gguf, parsed once as long as it stays the same."""
    try:
        said = path.stat()
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error.strerror}).", "Name a .gguf file.") from None
    if not path.is_file():
        raise TuneBenchError(f"{path} is no file.", "Name a .gguf file.")
    return _parsed(path.resolve(), said.st_mtime_ns, said.st_size)


@functools.lru_cache(MOST_KEPT)
def _parsed(path: Path, changed_ns: int, size: int) -> Checkpoint:
    return gguf.open_file(path)


def _in_gguf(path: Path) -> Source:
    found = open_gguf(path)
    return Source(found.name, path, found.config, path)


def _in_folder(folder: Path) -> Source:
    """A folder with a config.json and, where they lie there, weights."""
    path = folder / "config.json"
    data = _read_json(path)
    return Source(_name(path, data), path, data, folder if safetensors.has_weights(folder) else None)


def _in_cache(model: str) -> Source:
    """A hub id's snapshot in Hugging Face's cache; nothing is ever fetched."""
    fetch = f"Fetch it: hf download {model}"
    home = _cache() / f"models--{model.replace('/', '--')}"
    reference = home / "refs" / "main"
    try:
        commit = stored.read_bytes(reference, 100).decode().strip()
    except (OSError, ValueError):
        raise TuneBenchError(
            f"{model} is neither a file nor in Hugging Face's cache at {home.parent}.", fetch
        ) from None
    folder = home / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not (folder / "config.json").exists():
        raise TuneBenchError(f"the snapshot of {model} in {home} is incomplete: it has no config.json.", fetch)
    if not safetensors.has_weights(folder):
        raise TuneBenchError(f"the snapshot of {model} in {home} is incomplete: it has no *.safetensors.", fetch)
    try:
        safetensors.weight_files(folder)
    except TuneBenchError as error:
        raise TuneBenchError(f"the snapshot of {model} in {home} is incomplete: {error.message}", fetch) from None
    data = _read_json(folder / "config.json")
    return Source(model.rpartition("/")[2], folder / "config.json", data, folder)


def _cache() -> Path:
    """Where Hugging Face's own tools keep what they fetch."""
    said = os.environ
    shared = said.get("XDG_CACHE_HOME") or "~/.cache"
    home = said.get("HF_HOME") or f"{shared}/huggingface"
    return Path(said.get("HF_HUB_CACHE") or said.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub").expanduser()


def _name(path: Path, data: Mapping[str, Any]) -> str:
    """A config's own name; of a `config.json` its folder's, or what the config says where that folder is a commit's."""
    if path.stem != "config":
        return path.stem
    folder = path.resolve().parent.name
    if folder and not COMMIT.fullmatch(folder):
        return folder
    return str(data.get("_name_or_path") or "").rstrip("/").rpartition("/")[2] or str(data["model_type"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = stored.decode(stored.read_bytes(path, CONFIG_BYTES))
    except FileNotFoundError:
        raise TuneBenchError(f"no model config at {path}.", f"Name a file, or one of: {', '.join(names())}.") from None
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", "Name a Hugging Face config.json.") from None
    except ValueError as error:
        raise TuneBenchError(f"{path} is not JSON ({error}).", "Name a Hugging Face config.json.") from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise TuneBenchError(f"{path} is no model config: model_type is missing.", "Name a Hugging Face config.json.")
    return data
