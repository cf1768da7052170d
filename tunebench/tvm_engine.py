"""TuneBench's own engine: the compiled model on TVM's virtual machine, over a cache updated in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from tunebench.arena import Arena
from tunebench.errors import TuneBenchError
from tunebench.quantization.none import numpy_dtype
from tunebench.workload import Model, angles, function_name


@dataclass(frozen=True)
class Piece:
    """A run of `valid` tokens through the function for `bucket`; the rest of it is padding."""

    bucket: int
    valid: int


def pieces(n: int, position: int, chunks: tuple[int, ...], context: int) -> list[Piece]:
    """How a prompt of n tokens at `position` is served.

    In chunks, the largest first. A rest of more than half a chunk runs as that chunk, padded: the padding's
    cache entries are beyond every valid token and are overwritten by what comes next. A smaller rest goes on
    to the next smaller chunk, and in the end token by token.
    """
    found: list[Piece] = []
    left = n
    for bucket in sorted(chunks, reverse=True):
        while left >= bucket or (left > bucket // 2 and position + n - left + bucket <= context):
            found.append(Piece(bucket, min(left, bucket)))
            left -= found[-1].valid
    return found + [Piece(1, 1)] * left


@dataclass(frozen=True)
class Loaded:
    """Weights and cache in device memory, which several engines of one model may share."""

    params: list[tvm.runtime.Tensor]
    angles: tvm.runtime.Tensor
    keys: list[tvm.runtime.Tensor]
    values: list[tvm.runtime.Tensor]
    arena: Arena | None = None  # where they lie on a GPU


def load(model: Model, weights: Iterable[tuple[str, np.ndarray]], device: tvm.runtime.Device) -> Loaded:
    """Copy weights to the device as they come, so that no more than one is held twice, and make the cache."""
    shapes, (keys, values) = model.param_shapes, model.cache_shapes
    turns = angles(model)
    dtype, layers = model.workload.scheme.dtype, model.config.num_hidden_layers
    every = [*shapes.values(), (turns.shape, "float32"), *[(keys, dtype), (values, dtype)] * layers]
    arena = Arena(Arena.size_of(every), device) if model.workload.device == "gpu" else None
    new = arena.take if arena else functools.partial(tvm.runtime.empty, device=device)
    held = {name: new(*shapes[name]).copyfrom(array) for name, array in weights if name in shapes}
    missing = [name for name in shapes if name not in held]
    if missing:
        raise TuneBenchError(f"weights are missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")
    return Loaded(
        params=[held[name] for name in shapes],
        angles=new(turns.shape, "float32").copyfrom(turns),
        keys=_random_caches([new(keys, dtype) for _ in range(layers)]),
        values=_random_caches([new(values, dtype) for _ in range(layers)]),
        arena=arena,
    )


def _random_caches(caches: list[tvm.runtime.Tensor]) -> list[tvm.runtime.Tensor]:
    """Plausible contents for the positions that a test at depth does not compute first, the same in each layer."""
    shape, dtype = tuple(int(extent) for extent in caches[0].shape), numpy_dtype(str(caches[0].dtype))
    noise = np.random.default_rng(0).uniform(-1, 1, shape[-2:]).astype(dtype)
    caches[0].copyfrom(np.broadcast_to(noise, shape).copy())
    for cache in caches[1:]:
        cache.copyfrom(caches[0])
    return caches


class TvmEngine:
    """One executable over loaded weights."""

    name = "tvm"

    def __init__(
        self, model: Model, executable: relax.VMExecutable, loaded: Loaded, device: tvm.runtime.Device
    ) -> None:
        self.model, self.loaded, self.device = model, loaded, device
        machine = relax.VirtualMachine(executable, device)
        self._steps = {bucket: machine[function_name(bucket)] for bucket in model.workload.buckets}
        self._logits: tvm.runtime.Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        return self.model.weight_bytes

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`, in pieces."""
        load = self.model.workload
        self._check_room(position + tokens.shape[1])
        done = 0
        for piece in pieces(tokens.shape[1], position, load.chunks, load.context):
            part = np.zeros((load.batch, piece.bucket), np.int32)
            part[:, : piece.valid] = tokens[:, done : done + piece.valid]
            self._step(part, position + done, piece.valid - 1)
            done += piece.valid

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self._check_room(position + 1)
        self._step(tokens, position, 0)

    def wait(self) -> None:
        """Nothing: each step waits."""

    def function(self, bucket: int) -> Callable[..., tvm.runtime.Object]:
        """The compiled function for pieces of `bucket` tokens."""
        step: Callable[..., tvm.runtime.Object] = self._steps[bucket]
        return step

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        if self._logits is None:
            raise ValueError("nothing has been processed yet")
        return np.asarray(self._logits.numpy())

    def _check_room(self, end: int) -> None:
        context = self.model.workload.context
        if end > context:
            raise TuneBenchError(f"{end} positions are needed, and the context has {context}.", "Raise --context.")

    def _step(self, tokens: np.ndarray, position: int, last: int) -> None:
        device, loaded = self.device, self.loaded
        result = self._steps[tokens.shape[1]](
            tvm.runtime.tensor(np.ascontiguousarray(tokens, np.int32), device),
            tvm.runtime.tensor(np.array([position], np.int32), device),
            tvm.runtime.tensor(np.array([last], np.int32), device),
            loaded.angles,
            loaded.keys,
            loaded.values,
            loaded.params,
        )
        self._logits = result[0]
        device.sync()
