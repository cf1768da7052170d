"""The engine that runs a plan on a GPU API. It needs no TVM."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tunebench.engines.chunked import ChunkedEngine, random_cache
from tunebench.errors import TuneBenchError
from tunebench.runtime.apis import ApiDevice, Buffer, Call, Recording
from tunebench.runtime.plan import Plan


class Memory:
    """Weights, constants and cache on a device, by name, which plans of one model share."""

    def __init__(self, device: ApiDevice, plan: Plan, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        self.device = device
        self.buffers: dict[str, Buffer] = {}
        self.bytes = 0
        named = {buffer.name: buffer for buffer in plan.buffers}
        for name, array in arrays:
            if name in named:
                self._hold(name, array)
        for buffer in plan.buffers:
            if buffer.kind == "cache":
                self._hold(buffer.name, random_cache(buffer.shape, np.dtype(buffer.dtype)))
        missing = [b.name for b in plan.buffers if b.kind in ("weight", "constant") and b.name not in self.buffers]
        if missing:
            raise TuneBenchError(f"weights are missing: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}.")

    def _hold(self, name: str, array: np.ndarray) -> None:
        self.buffers[name] = self.device.allocate(array.nbytes)
        self.device.write(self.buffers[name], array)
        self.bytes += array.nbytes


class PlanEngine(ChunkedEngine):
    """One plan over memory that may be shared. Every step's launches are prepared once and replayed."""

    def __init__(self, plan: Plan, memory: Memory) -> None:
        facts = plan.facts
        super().__init__(facts.batch, facts.context, facts.chunks)
        self.chunk_ns = facts.chunk_ns
        self.plan = plan
        self._device = device = memory.device
        self._buffers = [memory.buffers.get(each.name) or device.allocate(each.bytes) for each in plan.buffers]
        self._kernels = {name: device.compile(shader) for name, shader in plan.shaders.items()}
        self._recorded: dict[int, Recording] = {}
        self._position, self._last_token = (self._buffers[plan.place(name)] for name in ("position", "last_token"))
        self._tokens = {chunk: self._buffers[plan.place(f"tokens.{chunk}")] for chunk in plan.steps}
        self._logits: Buffer | None = None
        self._rows = 0  # of them

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        return sum(buffer.bytes for buffer in self.plan.buffers if buffer.kind == "weight")

    def wait(self) -> None:
        """Until the device is done."""
        self._device.wait()

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        if self._logits is None:
            raise ValueError("nothing has been processed yet")
        shape = self._rows, self.plan.facts.vocab_size
        return self._device.read(self._logits, 4 * shape[0] * shape[1]).view(np.float32).reshape(shape)

    def _step(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        chunk = tokens.shape[1]
        step = self.plan.steps[chunk]
        if chunk not in self._recorded:
            calls = [
                Call(self._kernels[launch.shader], [self._buffers[i] for i in launch.buffers], launch.blocks)
                for launch in step.launches
            ]
            self._recorded[chunk] = self._device.record(calls)
        self._device.write(self._tokens[chunk], np.ascontiguousarray(tokens, np.int32))
        self._device.write(self._position, np.array([position], np.int32))
        self._device.write(self._last_token, np.array([last_token], np.int32))
        self._recorded[chunk].run()
        self._logits = self._buffers[step.logits]
        self._rows = self._batch * (chunk if self.plan.facts.all_logits else 1)
