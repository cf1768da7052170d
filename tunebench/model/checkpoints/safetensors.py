"""A Hugging Face folder: config.json, *.safetensors, sharded or not, and tokenizer.json."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench import stored as files
from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import (
    COPY,
    FLOATS,
    Checkpoint,
    Tensor,
    awq,
    compressed_tensors,
    float_form,
    fp8,
    gptq,
    mxfp4,
)
from tunebench.model.checkpoints.stored import Format, Stored
from tunebench.model.quantization import Arrays

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INDEX = "model.safetensors.index.json"
INDEX_BYTES = 64 << 20
FORMATS: dict[str, Format] = {
    each.name: each for module in (awq, compressed_tensors, fp8, gptq, mxfp4) for each in module.FORMATS
}
"""By `quant_method`."""
COMPANIONS = ("scale", "scales", "scale_inv", "zero_point", "zeros", "qzeros", "absmax", "quant_state", "SCB", "g_idx")
"""How the names end, after `.`, `_` or `.weight_`, of what stands beside a weight that is no plain number."""
MULTIMODAL = ("language_model.model.", "model.language_model.", "language_model.")
"""What the names of a text model's tensors begin with where it is a part of another."""


def open_folder(folder: Path, name: str, config: Mapping[str, Any]) -> Checkpoint:
    """The weights of a folder, under Hugging Face's names of the text model.

    A TuneBenchError says where there are none, where a file is damaged, or where they are of a form that is not read.
    """
    stored = Stored(folder, weight_files(folder))
    text = config.get("text_config")
    settings = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else {})
    form = _format(settings, folder)
    tensors, taken = _quantized(stored, form, settings or {}) if form else ({}, set())
    for each in stored.shapes.keys() - taken:
        if not _refused(stored, each) and each not in tensors:
            turned = config.get("model_type") == "gpt_oss" and each.endswith("_proj")  # its experts' floats
            tensors[each] = (_turned if turned else _plain)(stored, each)
    refused = {each: words for each in stored.shapes.keys() - taken if (words := _refused(stored, each))}
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(
        path=folder,
        name=name,
        scheme=form.scheme(settings or {}) if form and taken else "",
        config=config,
        tensors={_text_name(each): tensor for each, tensor in tensors.items()},
        refused={_text_name(each): words for each, words in refused.items()},
        make_tokenizer=functools.partial(_tokenizer, tokenizer) if tokenizer.is_file() else None,
    )


def _format(settings: Any, folder: Path) -> Format | None:
    """The format that config.json names; a TuneBenchError for one that is not read."""
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in FORMATS:
        raise TuneBenchError(
            f"the weights in {folder} are quantized as {str(method)[:80]!r}, which is not read.",
            f"Name a checkpoint in one of {', '.join(FORMATS)}, in floats, or a .gguf.",
        )
    return FORMATS[method]


def _quantized(stored: Stored, form: Format, settings: Any) -> tuple[dict[str, Tensor], set[str]]:
    """The matrices in a format, and the names of all tensors that they consist of."""
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    for name in sorted(stored.shapes):
        base = next((name.removesuffix(main) for main in form.main if name.endswith(main)), name)
        if base != name and base + form.gives not in tensors:
            tensors[base + form.gives] = form.tensor(stored, base, settings)
            taken |= {base + end for end in (*form.main, *form.others) if base + end in stored.shapes}
    return tensors, taken


def _refused(stored: Stored, name: str) -> str:
    """What a tensor is that cannot be taken as plain numbers; empty where it can."""
    base = name.removesuffix(".weight")
    ends = [f"{joint}{end}" for end in COMPANIONS for joint in (".", "_", ".weight_", ".weight.")]
    beside = next((base + end for end in ends if base + end in stored.shapes), "")
    kind = stored.dtypes[name]
    if beside and name.endswith(".weight"):
        return f"{kind} with {beside} beside it"
    return "" if kind in FLOATS else kind


def _turned(stored: Stored, name: str) -> Tensor:
    """Experts' matrices in plain numbers that lie as [experts, k, n]."""
    array = stored.floats(name, 3)
    experts, k, n = array.shape

    def read(start: int, stop: int) -> Arrays:
        each = range(start // n, -(-stop // n))
        rows = [array[e, :, max(start - e * n, 0) : min(stop - e * n, n)].T for e in each]
        return {"weight": np.concatenate(rows) if rows else np.empty((0, k), array.dtype)}

    return Tensor((experts * n, k), float_form(FLOATS[stored.dtypes[name]]), read)


def _plain(stored: Stored, name: str) -> Tensor:
    """A tensor of plain numbers; of three axes those of experts, [n, k] one below the other."""
    array = stored.arrays[name]
    if array.ndim == 3:
        array = array.reshape(-1, array.shape[2])

    def read(start: int, stop: int) -> Arrays:
        return {"weight": np.ascontiguousarray(array[start:stop])}

    return Tensor(array.shape, float_form(FLOATS[stored.dtypes[name]]), read)


def _text_name(name: str) -> str:
    """A tensor's name in the text model alone."""
    begins = next((each for each in MULTIMODAL if name.startswith(each)), "")
    rest = name.removeprefix(begins)
    return f"model.{rest}" if begins in MULTIMODAL[:2] else rest


def _tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # of Rust: there is no narrower type
        raise TuneBenchError(f"{path} is no tokenizer ({error}).", COPY) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder; a TuneBenchError where there are none, or one of them is missing or elsewhere."""
    index = folder / INDEX
    if index.exists():
        return [_inside(folder, name) for name in _indexed(index)]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise TuneBenchError(f"no *.safetensors in {folder}.", "Name a folder with Hugging Face weights.")
    return [_inside(folder, name) for name in names]


def has_weights(folder: Path) -> bool:
    """Whether a folder claims to hold any."""
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        names = files.decode(files.read_bytes(index, INDEX_BYTES))["weight_map"].values()
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a file's name is no text")
        return sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuneBenchError(f"{index} is no index of weights ({error!r}).", COPY) from None


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, or what stands for it in Hugging Face's cache; TuneBenchError for any other."""
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        path = (home / name).resolve()
        if any(path.is_relative_to(each) for each in homes) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # a name with a NUL, or links in a circle
        pass
    raise TuneBenchError(f"{name[:200]!r} is no file in {folder}.", "Copy the weights into that folder.")
