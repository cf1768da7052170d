"""PyTorch: transformers' own model over a static cache, with the same weights in float.

The model is Hugging Face's for the config; cache and attention are given to it through transformers' interfaces, so
that a step has static shapes and reads no more of the cache than a stretch that holds what is there. On a GPU a step is
compiled, where Triton and a C compiler are there, and recorded as a CUDA graph, one for each chunk size and stretch.
"""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.engines import hugging_face
from tunebench.engines.base import Engine, Weights
from tunebench.engines.baselines import Peer
from tunebench.model.description import Experts
from tunebench.spec import EngineName

if TYPE_CHECKING:
    from tunebench.model.workload import Model

ATTENTION = "tunebench"  # as transformers knows the attention here
SHAPES = 1000  # of steps that are compiled
STRETCH = 256  # positions: a step in a graph attends to a multiple of them, and masks what is not there yet


def refuses(model: Model) -> str:
    """Why it cannot run a model, or an empty string."""
    scheme, on_gpu = model.workload.scheme, model.workload.device_kind == "gpu"
    if model.workload.kv:
        return "its cache holds floats here"
    if model.decoder.is_recurrent:
        return "its cache holds keys and values alone here, no state of linear attention"
    if not on_gpu:
        is_float = scheme.weight.kind == "float" and not scheme.native
        return "" if is_float else "it has no such quantization on a CPU: compare q0f32, q0f16 or q0bf16"
    if scheme.dtype != "float16":
        return "it is compared in float16"
    import torch

    return "" if torch.cuda.is_available() else "this PyTorch has no CUDA"


class _Cache:
    """Each layer's keys and values, [b, heads, C, D], that grow at the places of a step, [n] int64."""

    def __init__(self, held: list[tuple[Any, Any]]) -> None:
        self.held, self.places, self.stretch = held, None, 0

    def update(self, key: Any, value: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store [b, heads, n, D] each, and return what the step attends to."""
        keys, values = self.held[layer]
        keys.index_copy_(2, self.places, key.to(keys.dtype))
        values.index_copy_(2, self.places, value)
        if not self.stretch:
            return key, value
        return keys[:, :, : self.stretch], values[:, :, : self.stretch]


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    masks: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attention of [b, heads, n, D] to [b, kv heads, m, D] as transformers calls it -> [b, n, heads, D].

    `masks` has one for each window, bool [n, m], or None where nothing but the causal one is needed.
    """
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, n, dim = query.shape
    kv_heads, mask = key.shape[1], masks[sliding_window or 0]
    if softcap or s_aux is not None:
        mixed = _spelled_out(query, key, value, mask, scaling or dim**-0.5, softcap, s_aux)
    else:
        if n == 1:  # the query heads that share keys become rows of one head
            query = query.reshape(batch, kv_heads, heads // kv_heads, dim)
        shared = n > 1 and heads > kv_heads
        causal = mask is None and n > 1
        mixed = scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scaling, enable_gqa=shared)
    return mixed.reshape(batch, heads, n, dim).transpose(1, 2).contiguous(), None


def _spelled_out(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float | None, sinks: Any) -> Any:
    """The same with soft caps or sinks, which PyTorch's own has not."""
    import torch

    batch, heads, n, dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, dim)
    scores = (rows @ key.transpose(2, 3)).float().reshape(batch, heads, n, -1) * scale
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    if mask is None:
        mask = torch.ones(n, n, dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, -1, n, 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.reshape(batch, key.shape[1], -1, key.shape[2]) @ value).reshape(batch, heads, n, dim)


class TorchEngine:
    """A model of transformers, a step at a time."""

    unit = 1  # positions: a step attends to a multiple of them

    def __init__(self, module: Any, model: Model) -> None:
        import torch

        self._torch, self._module = torch, module
        self._batch, self._context = model.workload.batch, model.workload.context
        attentions = model.decoder.attentions
        self._windows = {0, *(each.window for each in attentions)}
        shapes = [(self._batch, at.kv_heads, self._context, at.dim) for at in attentions]
        zeros = functools.partial(torch.zeros, dtype=module.dtype, device=module.device)
        self._cache = _Cache([(zeros(shape), zeros(shape)) for shape in shapes])

    @property
    def weight_bytes(self) -> int:
        """All parameters, one that stands for two once."""
        return sum(parameter.nbytes for parameter in self._module.parameters())

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        torch, n = self._torch, tokens.shape[1]
        ids = torch.from_numpy(np.ascontiguousarray(tokens)).long()
        with torch.inference_mode():
            self._logits = self._step(ids, torch.tensor([position]), self._stretch(n, position))

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self.prefill(tokens, position)

    def wait(self) -> None:
        """Nothing: each call waits."""

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        return np.asarray(self._logits.float().cpu().numpy())

    def _stretch(self, n: int, position: int) -> int:
        """Positions of the cache that a step reads; 0 where it is a whole prompt and needs none of them."""
        if position == 0 and n > 1:
            return 0
        return min(-(-(position + n) // self.unit) * self.unit, self._context)

    def _step(self, ids: Any, at: Any, stretch: int) -> Any:
        """Logits [b, vocab] after tokens [b, n] at a place, int64 [1]."""
        torch, n = self._torch, ids.shape[1]
        places = at + torch.arange(n, device=ids.device)
        self._cache.places, self._cache.stretch = places, stretch
        needed = stretch > 0 and (n > 1 or self.unit > 1)
        masks = {window: self._mask(places, stretch or n, window, needed) for window in self._windows}
        found = self._module(
            input_ids=ids,
            position_ids=places[None].expand(ids.shape[0], -1),
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
            masks=masks,
        )
        return found.logits[:, -1]

    def _mask(self, places: Any, length: int, window: int, needed: bool) -> Any:
        """Which of the first `length` positions each place sees, bool [n, length]."""
        if not needed and not 0 < window < length:
            return None
        positions = self._torch.arange(length, device=places.device)
        seen = positions <= places[:, None]
        return seen & (positions > places[:, None] - window) if window else seen


class CudaTorchEngine(TorchEngine):
    """The same on a GPU, a CUDA graph a chunk size and stretch of the cache."""

    unit = STRETCH

    def __init__(self, module: Any, model: Model) -> None:
        from torch import _dynamo
        from torch.utils._triton import has_triton

        super().__init__(module, model)
        for tensor in self._all():
            tensor.uniform_(-1, 1)
        self._graphs: dict[tuple[int, int], tuple[Any, Any, Any, Any]] = {}
        self._is_mixture = any(isinstance(layer.mlp, Experts) for layer in model.decoder.layers)
        _dynamo.config.recompile_limit = SHAPES
        compiles = has_triton() and (shutil.which("cc") or shutil.which("gcc"))
        self._run = self._torch.compile(self._step, dynamic=False, fullgraph=True) if compiles else self._step

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        n = tokens.shape[1]
        key = n, self._stretch(n, position)
        if self._is_mixture and n > 1:  # how many tokens an expert gets is read by the host, which no graph can do
            return self._eager(tokens, position)
        if key not in self._graphs:
            self._graphs[key] = self._record(*key)
        graph, ids, at, self._logits = self._graphs[key]
        ids.copy_(self._torch.from_numpy(np.ascontiguousarray(tokens)), non_blocking=True)
        at.fill_(position)
        graph.replay()

    def wait(self) -> None:
        """Until the device is done."""
        self._torch.cuda.synchronize()

    def _all(self) -> Iterator[Any]:
        """Every tensor of the cache."""
        return itertools.chain.from_iterable(self._cache.held)

    def _eager(self, tokens: np.ndarray, position: int) -> None:
        torch = self._torch
        ids = torch.from_numpy(np.ascontiguousarray(tokens)).long().cuda()
        self._module.set_experts_implementation("grouped_mm")
        with torch.inference_mode():
            self._logits = self._step(ids, torch.tensor([position]).cuda(), self._stretch(tokens.shape[1], position))

    def _record(self, n: int, stretch: int) -> tuple[Any, Any, Any, Any]:
        torch = self._torch
        ids = torch.zeros((self._batch, n), dtype=torch.int64, device="cuda")
        at = torch.zeros(1, dtype=torch.int64, device="cuda")
        if self._is_mixture:
            self._module.set_experts_implementation("batched_mm")
        held = [tensor[..., :n, :].clone() for tensor in self._all()]  # the warm-up writes at position 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(2):
                self._run(ids, at, stretch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            logits = self._run(ids, at, stretch)
        for tensor, was in zip(self._all(), held, strict=True):
            tensor[..., :n, :] = was
        return graph, ids, at, logits


@dataclass(frozen=True)
class _InPlace:
    """A tensor as transformers takes one from a file, that stays on its device: else it goes through the host."""

    tensor: Any

    def __getitem__(self, _: object) -> _InPlace:
        return self

    def to(self, device: object, dtype: Any) -> Any:
        """In the type that is asked for, wherever it is asked for."""
        return self.tensor.to(dtype)


def load(model: Model, weights: Weights, threads: int, folder: Path) -> Engine:
    """Hand the weights over under Hugging Face's names; `folder` is not needed."""
    import torch
    import transformers

    if threads:  # a GPU has none
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, model.workload.scheme.dtype)
    on_gpu = model.workload.device_kind == "gpu"
    tensors = hugging_face.tensors(model, weights, dtype, "cuda" if on_gpu else "cpu")
    state = {name: _InPlace(tensor) for name, tensor in tensors}
    transformers.AttentionInterface.register(ATTENTION, _attention)
    config = _config(model)
    found, about = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    wrong = [*about["missing_keys"], *about["unexpected_keys"], *about["mismatched_keys"]]
    if wrong:
        raise ValueError(f"transformers' {model.architecture.name} has other weights: {wrong[:3]}")
    _fix_rope(found.eval(), model)
    return CudaTorchEngine(found.cuda(), model) if on_gpu else TorchEngine(found, model)


def _fix_rope(module: Any, model: Model) -> None:
    """Let the context decide on a rotation that depends on the length, and not each step, which no graph could do."""
    import torch

    for each in module.modules():
        if getattr(each, "rope_type", "") in ("dynamic", "longrope"):
            rope = model.decoder.ropes[0].of(model.workload.context)
            each.inv_freq, each.attention_scaling = torch.tensor(rope.inv_freq, dtype=torch.float32), rope.times
            each.rope_type = "default"


def _config(model: Model) -> Any:
    """Hugging Face's config of the decoder, with as many layers as are run."""
    import transformers

    config = model.source.config if model.source else {}
    given = dict(config.get("text_config") or config)
    layers = len(model.decoder.layers)
    given |= {"num_hidden_layers": layers}
    if given.get("layer_types"):
        given["layer_types"] = given["layer_types"][:layers]
    for key in ("model_type", "quantization_config"):
        given.pop(key, None)
    return transformers.AutoConfig.for_model(model.architecture.name, **given)


def facts() -> dict[str, object]:
    """Versions of what computes."""
    import torch
    import transformers

    return {"torch": {"torch": torch.__version__, "transformers": transformers.__version__}}


PEERS = (
    Peer(
        name=EngineName.TORCH,
        summary="PyTorch with transformers' models over a static cache: float schemes on a CPU, in float16 on a GPU, "
        "compiled and as CUDA graphs",
        packages=("torch", "transformers"),
        refuses=refuses,
        load=load,
        facts=facts,
    ),
)
