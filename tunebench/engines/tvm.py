"""TuneBench's own engine: the compiled model on TVM's virtual machine, over a cache updated in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from tunebench.dtypes import numpy_dtype
from tunebench.engines.chunked import ChunkedEngine, random_cache
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model, function_name, rope_cos_sin
from tunebench.runtime.arena import Arena


@dataclass(frozen=True)
class Loaded:
    """Weights and cache in device memory, which several engines of one model may share."""

    params: list[tvm.runtime.Tensor]
    rope_cos_sin: list[tvm.runtime.Tensor]
    keys: list[tvm.runtime.Tensor]
    values: list[tvm.runtime.Tensor]
    arena: Arena | None = None  # where they lie on a GPU


def load(model: Model, weights: Iterable[tuple[str, np.ndarray]], device: tvm.runtime.Device) -> Loaded:
    """Copy weights to the device as they come, so that no more than one is held twice, and make the cache."""
    shapes, (keys, values) = model.param_shapes, model.caches
    turns = rope_cos_sin(model)
    every = [*shapes.values(), *((each.shape, "float32") for each in turns), *keys, *values]
    arena = Arena(Arena.size_of(every), device) if model.workload.device_kind == "gpu" else None
    new = arena.take if arena else functools.partial(tvm.runtime.empty, device=device)
    held = {name: new(*shapes[name]).copyfrom(array) for name, array in weights if name in shapes}
    missing = [name for name in shapes if name not in held]
    if missing:
        raise TuneBenchError(f"weights are missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
    return Loaded(
        params=[held[name] for name in shapes],
        rope_cos_sin=[new(each.shape, "float32").copyfrom(each) for each in turns],
        keys=_random_caches([new(*each) for each in keys]),
        values=_random_caches([new(*each) for each in values]),
        arena=arena,
    )


def _random_caches(caches: list[tvm.runtime.Tensor]) -> list[tvm.runtime.Tensor]:
    """The same contents in each layer."""
    first: dict[str, tvm.runtime.Tensor] = {}
    for cache in caches:
        known = first.setdefault(str(cache.dtype), cache)
        shape = tuple(int(extent) for extent in cache.shape)
        cache.copyfrom(random_cache(shape, numpy_dtype(str(cache.dtype))) if known is cache else known)
    return caches


class TvmEngine(ChunkedEngine):
    """One executable over loaded weights."""

    def __init__(
        self,
        model: Model,
        executable: relax.VMExecutable | tvm.runtime.Module,
        loaded: Loaded,
        device: tvm.runtime.Device,
    ) -> None:
        super().__init__(model.workload.batch, model.workload.context, model.workload.chunks)
        self.model, self.loaded, self.device = model, loaded, device
        machine = relax.VirtualMachine(executable, device)
        self._steps = {chunk: machine[function_name(chunk)] for chunk in model.workload.chunk_sizes}
        self._logits: tvm.runtime.Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        return self.model.weight_bytes

    def wait(self) -> None:
        """Nothing: each step waits."""

    def function(self, chunk: int) -> Callable[..., tvm.runtime.Object]:
        """The compiled function for chunks of `chunk` tokens."""
        step: Callable[..., tvm.runtime.Object] = self._steps[chunk]
        return step

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        if self._logits is None:
            raise ValueError("nothing has been processed yet")
        return np.asarray(self._logits.numpy())

    def _step(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        device, loaded = self.device, self.loaded
        result = self._steps[tokens.shape[1]](
            tvm.runtime.tensor(np.ascontiguousarray(tokens, np.int32), device),
            tvm.runtime.tensor(np.array([position], np.int32), device),
            tvm.runtime.tensor(np.array([last_token], np.int32), device),
            loaded.rope_cos_sin,
            loaded.keys,
            loaded.values,
            loaded.params,
        )
        self._logits = result[0]
        device.sync()
