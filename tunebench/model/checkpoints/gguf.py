"""A .gguf file: its tensors under Hugging Face's names and in Hugging Face's order of rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tunebench.errors import TuneBenchError, brief
from tunebench.model.checkpoints import COPY, FLOATS, Checkpoint, Tensor, float_form, reordered, swapped
from tunebench.model.checkpoints.ggml import BLOCKS
from tunebench.model.checkpoints.gguf_config import KINDS, Kind, kind_of, read_config
from tunebench.model.checkpoints.gguf_tokenizer import read_tokenizer
from tunebench.model.quantization import Array, Arrays

QUANTS = re.compile(r"[.-](I?Q\d\w*|MXFP4\w*|B?F16|F32)$", re.IGNORECASE)
"""How a file's name ends where it says the form of the weights."""
LAYER = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *(
        f"self_attn.{each}"
        for each in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "sinks")
    ),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    *("mlp.gate", "mlp.router", "block_sparse_moe.gate"),
)
NEOX_LAYER = (
    *("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
TOP = ("model.embed_tokens", "model.norm", "lm_head")
NEOX_TOP = ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out")
EXPERTS = ("gate", "up", "down")


def open_file(path: Path) -> Checkpoint:
    """A GGUF file; a TuneBenchError says why where it is none that can be read."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        raw = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # of damaged bytes any: the package checks few of them
        raise TuneBenchError(f"cannot read {path} ({brief(error)}).", COPY) from None
    name = str(fields.get("general.architecture"))
    kind = kind_of(name, fields)
    if kind is None:
        raise TuneBenchError(f"{path} is a {name[:40]!r}, which is not read.", f"Choose one of {', '.join(KINDS)}.")
    held = {each: _tensor(tensor) for each, tensor in raw.items()}
    tensors = {each: tensor for each, tensor in held.items() if isinstance(tensor, Tensor)}
    config = read_config(path, kind, name, fields, tensors)
    layers = int(config["num_hidden_layers"])
    renamed = dict(_renamed(kind, _names(kind, name, layers), tensors, config))
    if kind.experts:
        renamed |= dict(_experts(kind, layers, int(config[kind.expert_count]), tensors))
    refused = {
        hf: str(held[each]) for hf, each in _names(kind, name, layers).items() if isinstance(held.get(each), str)
    }
    quantized = any(tensor.form.kind != "float" for tensor in renamed.values())
    return Checkpoint(
        path=path,
        name=QUANTS.sub("", path.stem),
        scheme=_scheme(fields, raw) if quantized or refused else "",
        config=config,
        tensors=renamed,
        refused=refused,
        make_tokenizer=functools.partial(read_tokenizer, path, fields),
    )


def _scheme(fields: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """What llama.cpp calls the mixture of types; the type of most matrices where it says nothing."""
    import gguf

    try:
        return str(gguf.LlamaFileType(fields.get("general.file_type", -1)).name).removeprefix("MOSTLY_")
    except ValueError:
        kinds = [str(tensor.tensor_type.name) for tensor in raw.values() if len(tensor.shape) > 1]
        return max(set(kinds), key=kinds.count)


def _tensor(tensor: Any) -> Tensor | str:
    """A stored tensor of two axes or one; or the name of a type that is not read."""
    kind, shape = tensor.tensor_type.name, tuple(int(extent) for extent in reversed(tensor.shape))
    if kind not in FLOATS and (kind not in BLOCKS or len(shape) == 1):
        return str(kind)
    shape = (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else shape
    rows = tensor.data.view(np.uint8).reshape(shape[0], -1)
    if kind in FLOATS:
        dtype = {"BF16": ml_dtypes.bfloat16}.get(kind) or np.dtype(FLOATS[kind])
        return Tensor(shape, float_form(FLOATS[kind]), functools.partial(_floats, rows, dtype, len(shape)))
    block = BLOCKS[kind]
    return Tensor(shape, block.form, lambda start, stop: block.read(rows[start:stop]))


def _floats(rows: Array, dtype: Any, rank: int, start: int, stop: int) -> Arrays:
    found = np.ascontiguousarray(rows[start:stop]).view(dtype)
    return {"weight": found.reshape(-1) if rank == 1 else found}


def _names(kind: Kind, architecture: str, layers: int) -> dict[str, str]:
    """GGUF's name of each tensor that there may be, by Hugging Face's."""
    import gguf

    neox = kind.model_type == "gpt_neox"
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    found = gguf.get_tensor_name_map(number, layers)
    block = "gpt_neox.layers" if neox else "model.layers"
    in_layer = [f"{block}.{i}.{each}" for i in range(layers) for each in (NEOX_LAYER if neox else LAYER)]
    names: dict[str, str] = {}
    for name in (*(NEOX_TOP if neox else TOP), *in_layer):
        ggml = found.get_name(name)
        if ggml:
            ends = [""] if name.endswith("sinks") else [".weight", ".bias"]
            names |= {name + end: ggml + (end or ".weight") for end in ends}
    return names


def _renamed(
    kind: Kind, names: Mapping[str, str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are there, as Hugging Face has them."""
    for name, ggml in names.items():
        if ggml not in tensors:
            continue
        tensor = tensors[ggml]
        order = _order(kind, name, tensor.shape[0], config)
        if order is not None:
            tensor = replace(tensor, read=_reordered(tensor, order))
        if kind.norms_plus_one and name.endswith("norm.weight"):
            tensor = replace(tensor, read=_minus_one(tensor))
        yield name, tensor


def _order(kind: Kind, name: str, n: int, config: Mapping[str, Any]) -> Array | None:
    """Where each row is found in the file, where that is not in its own place."""
    heads = int(config["num_attention_heads"])
    if kind.turned and name.split(".")[-2] in ("q_proj", "k_proj"):
        heads = heads if ".q_proj." in name else int(config.get("num_key_value_heads") or heads)
        _check_rows(name, n, 2 * heads)
        return np.arange(n).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if ".query_key_value." in name:
        _check_rows(name, n, 3 * heads)
        return swapped(n, 3, heads)
    return None


def _check_rows(name: str, n: int, parts: int) -> None:
    if n % parts:
        raise TuneBenchError(f"{name} has {n} rows, which {parts} does not divide.", COPY)


def _reordered(tensor: Tensor, order: Array) -> Callable[[int, int], Arrays]:
    """Reads rows from where `order` says they are."""

    def read(start: int, stop: int) -> Arrays:
        at = order[start:stop]
        low = int(at.min(initial=0))
        return reordered(tensor.read(low, int(at.max(initial=low)) + 1), at - low)

    return read


def _minus_one(tensor: Tensor) -> Callable[[int, int], Arrays]:
    def read(start: int, stop: int) -> Arrays:
        return {name: part - part.dtype.type(1) for name, part in tensor.read(start, stop).items()}

    return read


def _experts(kind: Kind, layers: int, count: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The experts' tensors: each expert's own, or, in gpt-oss, one for gates and ups, row by row in turn."""
    for i in range(layers):
        found = {each: tensors.get(f"blk.{i}.ffn_{each}_exps.weight") for each in EXPERTS}
        bias = {each: tensors.get(f"blk.{i}.ffn_{each}_exps.bias") for each in EXPERTS}
        base = f"model.layers.{i}.{kind.experts}"
        if kind.model_type == "gpt_oss":
            yield from _fused(base, "", found)
            yield from _fused(base, "_bias", bias)
            continue
        for each, tensor in found.items():
            if tensor:
                n = tensor.shape[0] // count
                for e in range(count):
                    yield f"{base}.{e}.{kind.expert_names[each]}.weight", _rows(tensor, e * n, n)


def _rows(tensor: Tensor, first: int, n: int) -> Tensor:
    """n rows of a tensor from `first` on, as one of its own."""
    return Tensor((n, *tensor.shape[1:]), tensor.form, lambda start, stop: tensor.read(first + start, first + stop))


def _fused(base: str, end: str, found: Mapping[str, Tensor | None]) -> Iterator[tuple[str, Tensor]]:
    gate, up, down = (found[each] for each in EXPERTS)
    if down:
        yield f"{base}.down_proj{end}", down
    if gate and up and gate.shape == up.shape and gate.form == up.form:
        n, k = gate.shape
        if end:  # a row an expert
            yield f"{base}.gate_up_proj{end}", Tensor((n, 2 * k), gate.form, _in_turn(gate, up, columns=True))
        else:
            yield f"{base}.gate_up_proj", Tensor((2 * n, k), gate.form, _in_turn(gate, up))


def _in_turn(first: Tensor, second: Tensor, columns: bool = False) -> Callable[[int, int], Arrays]:
    """A row, or a column, of the first, then one of the second."""

    def read(start: int, stop: int) -> Arrays:
        begin, end = (start, stop) if columns else (start // 2, -(-stop // 2))
        a, b = first.read(begin, end), second.read(begin, end)
        if columns:
            return {name: np.stack([a[name], b[name]], axis=2).reshape(len(a[name]), -1) for name in a}
        rows = slice(start % 2, start % 2 + stop - start)
        return {name: np.stack([a[name], b[name]], axis=1).reshape(-1, *a[name].shape[1:])[rows] for name in a}

    return read
