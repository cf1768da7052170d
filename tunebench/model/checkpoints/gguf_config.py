"""What a GGUF file says of its model, as Hugging Face's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tunebench.errors import TuneBenchError
from tunebench.model.checkpoints import COPY, Tensor
from tunebench.model.quantization import Array

NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
"""Hugging Face's names by GGUF's, after the architecture's."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How Llama 3.1 and later scale their rotation, whose result alone is in a file."""


@dataclass(frozen=True)
class Kind:
    """A GGUF architecture: Hugging Face's name of it, and where it differs."""

    model_type: str
    names: Mapping[str, str] = field(default_factory=dict)  # as NAMES, what it has besides
    constants: Mapping[str, Any] = field(default_factory=dict)  # of the config, which no file says
    turned: bool = False  # rows of q and k lie as a rotation of neighbours wants them
    norms_plus_one: bool = False  # weights of norms have 1 added
    experts: str = ""  # what experts' names begin with, in a layer
    expert_count: str = ""  # the config's name of it
    expert_names: Mapping[str, str] = field(default_factory=dict)


_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFT_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
MIXTRAL = Kind(
    "mixtral",
    {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    turned=True,
    experts="block_sparse_moe.experts",
    expert_count="num_local_experts",
    expert_names={"gate": "w1", "up": "w3", "down": "w2"},
)
KINDS = {
    "llama": Kind("llama", turned=True),
    "qwen2": Kind("qwen2", constants=_NO_WINDOW),
    "qwen3": Kind("qwen3", constants=_NO_WINDOW),
    "phi3": Kind("phi3", _WINDOW),
    "gemma2": Kind("gemma2", _WINDOW, _SOFT_GELU, norms_plus_one=True),
    "gemma3": Kind(
        "gemma3_text", {**_WINDOW, "rope.freq_base_swa": "rope_local_base_freq"}, _SOFT_GELU, norms_plus_one=True
    ),
    "gptneox": Kind("gpt_neox", {"use_parallel_residual": "use_parallel_residual"}, {"hidden_act": "gelu"}),
    "granite": Kind("granite", _GRANITE, turned=True),
    "qwen3moe": Kind(
        "qwen3_moe",
        {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        {"norm_topk_prob": True, **_NO_WINDOW},
        experts="mlp.experts",
        expert_count="num_experts",
        expert_names={"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    ),
    "gpt-oss": Kind(
        "gpt_oss",
        {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            **_WINDOW,
        },
        {"attention_bias": True},
        experts="mlp.experts",
        expert_count="num_local_experts",
    ),
}
"""By GGUF's name of the architecture."""


def read_config(
    path: Path, kind: Kind, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Hugging Face's config; a TuneBenchError names what is missing."""
    own = {key.removeprefix(f"{architecture}."): value for key, value in fields.items()}
    if "token_embd.weight" not in tensors:
        raise TuneBenchError(f"{path} has no embedding.", COPY)
    found = {name: _plain(path, key, own[key]) for key, name in {**NAMES, **kind.names}.items() if key in own}
    _check(path, found, kind.expert_count)
    config = {
        "model_type": kind.model_type,
        **kind.constants,
        **found,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if "tokenizer.ggml.eos_token_id" in fields:
        config["eos_token_id"] = fields["tokenizer.ggml.eos_token_id"]
    if kind.model_type in ("llama", "granite"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if "sliding_window" in config:
        config["sliding_window"] = config["sliding_window"] or None
    return {**config, **_heads(kind, own, config), **_rope(own, config, tensors)}


def _check(path: Path, found: Mapping[str, Any], expert_count: str) -> None:
    """Raise a TuneBenchError where there is no whole number, or one that no model has, of what tensors are found by."""
    most = {"num_hidden_layers": 1024, "num_attention_heads": 4096, "num_key_value_heads": 4096, "hidden_size": 1 << 22}
    most |= {expert_count: 4096} if expert_count else {}
    for name, limit in most.items():
        value = found.get(name, 1 if name == "num_key_value_heads" else None)
        if not isinstance(value, int) or not 1 <= value <= limit:
            raise TuneBenchError(f"{path} says no {name} from 1 to {limit}.", COPY)


def kind_of(architecture: str, fields: Mapping[str, Any]) -> Kind | None:
    """The kind of an architecture; Mixtral is a llama with experts."""
    experts = architecture == "llama" and fields.get("llama.expert_count")
    return MIXTRAL if experts else KINDS.get(architecture)


def _plain(path: Path, key: str, value: Any) -> Any:
    """One value: of layers that all have the same; a float as it was written before it was rounded to float32."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise TuneBenchError(f"{path}: {key} differs between layers, which is not supported.")
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _heads(kind: Kind, own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the width of a head."""
    heads = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or config.get("hidden_size", 0) // heads)
    found: dict[str, Any] = {}
    turned = own.get("rope.dimension_count")
    if turned and head_dim and turned != head_dim:
        found["rotary_pct" if kind.model_type == "gpt_neox" else "partial_rotary_factor"] = turned / head_dim
    if kind.model_type in ("gemma2", "gemma3_text"):  # only the models of 27 B have another
        largest = config.get("num_hidden_layers") in (46, 62)
        found["query_pre_attn_scalar"] = config["hidden_size"] // heads if largest else head_dim
    return found


def _rope(own: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """`rope_scaling`, where there is such: as metadata say it, or as the factors by which frequencies are divided."""
    kind, factor = own.get("rope.scaling.type"), own.get("rope.scaling.factor")
    original = own.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in tensors:
        return {"rope_scaling": _llama3(_factors(tensors["rope_freqs.weight"]), config)}
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        long, short = (_factors(tensors[f"rope_factors_{each}.weight"]).tolist() for each in ("long", "short"))
        scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        said = own.get("rope.scaling.attn_factor", 0.0)
        if said and not math.isclose(said, _attention_factor(config, original), rel_tol=1e-5):
            scaling["attention_factor"] = said
        top = {} if original is None else {"original_max_position_embeddings": original}
        return {"rope_scaling": scaling, **top}
    if kind not in ("linear", "yarn") or not factor:
        return {}
    found = {"rope_type": kind, "factor": factor}
    return {"rope_scaling": found if original is None else {**found, "original_max_position_embeddings": original}}


def _attention_factor(config: Mapping[str, Any], original: int | None) -> float:
    """What follows for longrope from how much longer the context is than it was."""
    longest = config.get("max_position_embeddings", 0)
    return math.sqrt(1 + math.log(longest / original) / math.log(original)) if original and longest > original else 1.0


def _factors(tensor: Tensor) -> Array:
    return np.asarray(tensor.read(0, tensor.shape[0])["weight"], np.float64)


def _llama3(factors: Array, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling that gives these factors, or the factors themselves as those of any length."""
    half, theta = len(factors), float(config.get("rope_theta", 10000.0))
    waves = 2 * np.pi * theta ** (np.arange(half) / half)
    low, high, original = LLAMA3.values()
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factors.max() + smooth)
    if np.allclose(factors, expected, rtol=1e-4):
        return {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    return {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": factors.tolist(),
        "attention_factor": 1.0,
    }
