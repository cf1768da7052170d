"""PyTorch: the model as eager operators over a static cache, with the same weights in float.

On a GPU the operators of a step are recorded as a CUDA graph for each chunk size and each stretch of the
cache, and replayed; quantized weights are dequantized to the activations' type when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tunebench.engines.base import Engine, Weights
from tunebench.engines.baselines import Peer
from tunebench.spec import EngineName, WeightFormat

if TYPE_CHECKING:
    from tunebench.model.architectures.llama import LlamaConfig
    from tunebench.model.workload import Model


def refuses(model: Model) -> str:
    """Why it cannot run a model, or an empty string."""
    if model.architecture.name != "llama":
        return f"it has no {model.architecture.name}"
    scheme, on_gpu = model.workload.scheme, model.workload.device_kind == "gpu"
    weight = scheme.weight
    if weight.kind != "float" and not on_gpu:
        return "it has no such quantization on a CPU: compare q0f32, q0f16 or q0bf16"
    by_row = weight.layout == "NK" and weight.packing == "in_order" and weight.zero == "symmetric"
    if on_gpu and not (scheme.dtype == "float16" and by_row):
        return "it is compared in float16, with symmetric weights stored row by row"
    if on_gpu:
        import torch

        return "" if torch.cuda.is_available() else "this PyTorch has no CUDA"
    return ""


STRETCH = 256  # positions: a graph attends to a multiple of them, and masks what is not there yet


@dataclass(frozen=True)
class _Shape:
    config: LlamaConfig
    batch: int
    context: int

    @staticmethod
    def of(model: Model) -> _Shape:
        """A model that `refuses` has nothing against."""
        return _Shape(cast("LlamaConfig", model.config), model.workload.batch, model.workload.context)


class TorchEngine:
    """A llama in eager mode. Products and attention are PyTorch's own kernels, in the weights' type."""

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

    def wait(self) -> None:
        """Nothing: each call waits."""

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


class CudaTorchEngine:
    """A llama in float16 on the GPU, a CUDA graph a chunk size and stretch of the cache."""

    def __init__(self, shape: _Shape, weights: dict[str, Any]) -> None:
        import torch

        self._torch, self._shape, self._weights = torch, shape, weights
        config = shape.config
        cache = (config.num_hidden_layers, 2, shape.batch, config.num_key_value_heads, shape.context, config.head_dim)
        self._cache = torch.zeros(cache, dtype=torch.float16, device="cuda").uniform_(-1, 1)
        half = config.head_dim // 2
        frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        turned = torch.arange(shape.context, dtype=torch.float32)[:, None] * frequency
        self._cos, self._sin = turned.cos().repeat(1, 2).cuda(), turned.sin().repeat(1, 2).cuda()
        self._graphs: dict[tuple[int, int], tuple[Any, Any, Any, Any]] = {}

    @property
    def weight_bytes(self) -> int:
        """All tensors."""
        return sum(tensor.nbytes for tensor in self._weights.values())

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        torch, n = self._torch, tokens.shape[1]
        stretch = 0 if position == 0 and n > 1 else -(-(position + n) // STRETCH) * STRETCH
        key = n, min(stretch, self._shape.context)
        if key not in self._graphs:
            self._graphs[key] = self._record(*key)
        graph, ids, at, logits = self._graphs[key]
        ids.copy_(torch.from_numpy(np.ascontiguousarray(tokens)), non_blocking=True)
        at.fill_(position)
        graph.replay()
        self._logits = logits

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self.prefill(tokens, position)

    def wait(self) -> None:
        """Until the device is done."""
        self._torch.cuda.synchronize()

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        return np.asarray(self._logits.float().cpu().numpy())

    def _record(self, n: int, stretch: int) -> tuple[Any, Any, Any, Any]:
        torch = self._torch
        ids = torch.zeros((self._shape.batch, n), dtype=torch.int32, device="cuda")
        at = torch.zeros(1, dtype=torch.int64, device="cuda")
        held = self._cache[:, :, :, :, : max(n, 1)].clone()  # the warm-up writes at position 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(2):
                self._step(ids, at, stretch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            logits = self._step(ids, at, stretch)
        self._cache[:, :, :, :, : max(n, 1)] = held
        return graph, ids, at, logits

    def _step(self, ids: Any, at: Any, stretch: int) -> Any:
        torch, functional, weights, config = self._torch, self._torch.nn.functional, self._weights, self._shape.config
        x = functional.embedding(ids, weights["model.embed_tokens"])
        places = at + torch.arange(ids.shape[1], device="cuda")
        mask = (torch.arange(stretch, device="cuda") <= places[:, None]) if stretch else None
        turn = self._cos[places], self._sin[places]

        def norm(y: Any, name: str) -> Any:
            return functional.rms_norm(y, (config.hidden_size,), weights[name], config.rms_norm_eps)

        for i in range(config.num_hidden_layers):
            name = f"model.layers.{i}"
            x = x + self._attention(norm(x, f"{name}.input_layernorm"), i, places, turn, mask)
            y = norm(x, f"{name}.post_attention_layernorm")
            gate, up = functional.linear(y, weights[f"{name}.mlp.gate_up_proj"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, weights[f"{name}.mlp.down_proj"])
        return functional.linear(norm(x[:, -1], "model.norm"), weights["lm_head"])

    def _attention(self, x: Any, layer: int, places: Any, turn: tuple[Any, Any], mask: Any) -> Any:
        config, functional, torch = self._shape.config, self._torch.nn.functional, self._torch
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        batch, n = x.shape[:2]
        name = f"model.layers.{layer}.self_attn"
        qkv = functional.linear(x, self._weights[f"{name}.qkv_proj"]).view(batch, n, heads + 2 * kv_heads, dim)
        turned, v = qkv[:, :, : heads + kv_heads].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)
        half = dim // 2
        swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
        turned = (turned * turn[0] + swapped * turn[1]).to(x.dtype)
        q, k = turned[:, :heads], turned[:, heads:]
        keys, values = self._cache[layer]
        keys.index_copy_(2, places, k)
        values.index_copy_(2, places, v)
        if mask is None:  # a whole prompt
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads > kv_heads)
        else:
            stretch = mask.shape[1]
            if n == 1:  # the query heads that share keys become rows of one head
                q = q.reshape(batch, kv_heads, heads // kv_heads, dim)
            mixed = functional.scaled_dot_product_attention(
                q, keys[:, :, :stretch], values[:, :, :stretch], mask, enable_gqa=n > 1 and heads > kv_heads
            ).reshape(batch, heads, n, dim)
        return functional.linear(mixed.transpose(1, 2).reshape(batch, n, heads * dim), self._weights[f"{name}.o_proj"])


def _load_on_gpu(model: Model, weights: Weights) -> Engine:
    """Every matrix in float16 on the GPU; a quantized one from its two parts, which come one after the other."""
    import torch

    held: dict[str, Any] = {}
    weight = model.workload.scheme.weight
    for name, array in weights:
        tensor = torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array).cuda()
        base, _, part = name.rpartition(".")
        if part == "q_weight":
            held[name] = tensor
        elif part == "q_scale":
            held[base] = _dequantized(held.pop(f"{base}.q_weight"), tensor, weight)
        else:
            held[base if part == "weight" else name] = tensor
    return CudaTorchEngine(_Shape.of(model), held)


def _dequantized(words: Any, scales: Any, weight: WeightFormat) -> Any:
    """int32 words [N, K / per word] and scales [N, K / group] -> float16 [N, K], a block of rows at a time."""
    import torch

    shifts = torch.arange(0, 32, weight.bits, device="cuda", dtype=torch.int32)
    rows = []
    for start in range(0, words.shape[0], 4096):
        block = ((words[start : start + 4096, :, None] >> shifts) & ((1 << weight.bits) - 1)) - weight.zero_point
        block = block.reshape(block.shape[0], scales.shape[1], -1).half() * scales[start : start + 4096, :, None]
        rows.append(block.reshape(block.shape[0], -1))
    return torch.cat(rows)


def load(model: Model, weights: Weights, threads: int, folder: Path) -> Engine:
    """Hand the weights over, a tensor each; `folder` is not needed."""
    import torch

    if model.workload.device_kind == "gpu":
        return _load_on_gpu(model, weights)
    held: dict[str, Any] = {}
    for name, array in weights:
        if array.dtype.name == "bfloat16":  # numpy's bfloat16 is not torch's, but has the same bits
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        held[name.removesuffix(".weight")] = tensor
    return TorchEngine(_Shape.of(model), held, threads)


PEERS = (
    Peer(
        name=EngineName.TORCH,
        summary="PyTorch, eager operators over a static cache: float schemes on a CPU, CUDA graphs in float16 on a GPU",
        packages=("torch",),
        refuses=refuses,
        load=load,
    ),
)
