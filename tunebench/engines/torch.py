"""PyTorch on the CPU: the model as eager operators over a static cache, with the same float weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.engines import Engine, Peer, Weights
from tunebench.models import ModelConfig

if TYPE_CHECKING:
    from tunebench.workload import Model


def refuses(model: Model) -> str:
    """Why it cannot run a model, or an empty string."""
    if model.architecture.name != "llama":
        return f"it has no {model.architecture.name}"
    if model.workload.scheme.family != "none":
        return "it has no such quantization on a CPU: compare q0f32, q0f16 or q0bf16"
    return ""


@dataclass(frozen=True)
class _Shape:
    config: ModelConfig
    batch: int
    context: int


class TorchEngine:
    """A llama in eager mode. Products and attention are PyTorch's own kernels, in the weights' type."""

    name = "torch"

    def __init__(self, shape: _Shape, weights: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._shape, self._weights = torch, shape, weights
        config = shape.config
        cache = (config.num_hidden_layers, 2, shape.batch, config.num_key_value_heads, shape.context, config.head_dim)
        self._dtype = weights["lm_head"].dtype
        self._cache = torch.zeros(cache, dtype=self._dtype)
        half = config.head_dim // 2
        frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        turned = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequency
        self._cos, self._sin = turned.cos().repeat(1, 2), turned.sin().repeat(1, 2)

    @property
    def weight_bytes(self) -> int:
        """All tensors."""
        return sum(tensor.nbytes for tensor in self._weights.values())

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        torch = self._torch
        with torch.inference_mode():
            self._logits = self._step(torch.from_numpy(np.ascontiguousarray(tokens)).long(), position)

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self.prefill(tokens, position)

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        return np.asarray(self._logits.float().numpy())

    def _step(self, tokens: Any, position: int) -> Any:
        functional, weights = self._torch.nn.functional, self._weights
        x = functional.embedding(tokens, weights["model.embed_tokens"])
        for i in range(self._shape.config.num_hidden_layers):
            name = f"model.layers.{i}"
            x = x + self._attention(self._norm(x, f"{name}.input_layernorm"), i, position)
            y = self._norm(x, f"{name}.post_attention_layernorm")
            gate, up = functional.linear(y, weights[f"{name}.mlp.gate_up_proj"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, weights[f"{name}.mlp.down_proj"])
        return functional.linear(self._norm(x[:, -1], "model.norm"), weights["lm_head"])

    def _norm(self, x: Any, name: str) -> Any:
        config = self._shape.config
        return self._torch.nn.functional.rms_norm(x, (config.hidden_size,), self._weights[name], config.rms_norm_eps)

    def _attention(self, x: Any, layer: int, position: int) -> Any:
        config, functional = self._shape.config, self._torch.nn.functional
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        batch, n = x.shape[:2]
        end = position + n
        name = f"model.layers.{layer}.self_attn"
        qkv = functional.linear(x, self._weights[f"{name}.qkv_proj"]).view(batch, n, heads + 2 * kv_heads, dim)
        q, k, v = qkv.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        keys, values = self._cache[layer]
        keys[:, :, position:end] = self._rotate(k, position)
        values[:, :, position:end] = v
        mask = None
        if n > 1:
            mask = self._torch.ones(n, end, dtype=self._torch.bool).tril(diagonal=position)
        mixed = functional.scaled_dot_product_attention(
            self._rotate(q, position), keys[:, :, :end], values[:, :, :end], attn_mask=mask, enable_gqa=heads > kv_heads
        )
        return functional.linear(mixed.transpose(1, 2).reshape(batch, n, heads * dim), self._weights[f"{name}.o_proj"])

    def _rotate(self, x: Any, position: int) -> Any:
        n, half = x.shape[2], x.shape[3] // 2
        cos, sin = self._cos[position : position + n], self._sin[position : position + n]
        turned = self._torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return (x * cos + turned * sin).to(self._dtype)


def load(model: Model, weights: Weights, threads: int, folder: Path) -> Engine:
    """Hand the weights over, a tensor each; `folder` is not needed."""
    import torch

    held: dict[str, Any] = {}
    for name, array in weights:
        if array.dtype.name == "bfloat16":  # numpy's bfloat16 is not torch's, but has the same bits
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        held[name.removesuffix(".weight")] = tensor
    return TorchEngine(_Shape(model.config, model.workload.batch, model.workload.context), held, threads)


PEERS = (
    Peer(
        name="torch",
        summary="PyTorch on the CPU, eager operators over a static cache: float schemes",
        packages=("torch",),
        refuses=refuses,
        load=load,
    ),
)
