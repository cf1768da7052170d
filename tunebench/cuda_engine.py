"""TuneBench's engine on CUDA: each compiled function recorded once as a graph over static buffers, then replayed."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tunebench import cublas, cuda_runtime  # noqa: F401  (cublas: compiled kernels may call it)
from tunebench.tvm_engine import Loaded, TvmEngine
from tunebench.workload import Model


class CudaEngine(TvmEngine):
    """One executable over loaded weights. A step is three small copies and one launch; nothing waits inside it."""

    def __init__(
        self, model: Model, executable: relax.VMExecutable, loaded: Loaded, device: tvm.runtime.Device
    ) -> None:
        super().__init__(model, executable, loaded, device)
        self._stream = cuda_runtime.Stream()
        self._recorded: dict[int, _Recorded] = {}  # by piece length

    def wait(self) -> None:
        """Until the device is done."""
        self._stream.wait()

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        self.wait()
        return super().logits()

    def _step(self, tokens: np.ndarray, position: int, last: int) -> None:
        bucket = tokens.shape[1]
        if bucket not in self._recorded:
            self._recorded[bucket] = _Recorded(self, bucket, self._stream)
        recorded = self._recorded[bucket]
        recorded.replay(tokens, position, last)
        self._logits = recorded.logits


class _Recorded:
    """One compiled function as a graph, and its inputs in device memory."""

    def __init__(self, engine: CudaEngine, bucket: int, stream: cuda_runtime.Stream) -> None:
        device = engine.device
        batch = engine.model.workload.batch
        self._stream = stream
        self._tokens = tvm.runtime.tensor(np.zeros((batch, bucket), np.int32), device)
        self._position = tvm.runtime.tensor(np.zeros(1, np.int32), device)
        self._last = tvm.runtime.tensor(np.zeros(1, np.int32), device)
        held, inputs = engine.loaded, (self._tokens, self._position, self._last)
        kept: list[tvm.runtime.Tensor] = []  # the output, which the graph writes each time

        def step() -> None:
            result = engine.function(bucket)(*inputs, held.angles, held.keys, held.values, held.params)
            kept[:] = [result[0]]

        stream.run(step)  # loads kernels and takes memory, which a recording must not
        stream.run(step)
        self._graph = stream.record(step)
        self.logits = kept[0]

    def replay(self, tokens: np.ndarray, position: int, last: int) -> None:
        """Process int32 tokens [b, bucket]; returns before the device is done."""
        self._stream.upload(self._tokens, np.ascontiguousarray(tokens, np.int32))
        self._stream.upload(self._position, np.array([position], np.int32))
        self._stream.upload(self._last, np.array([last], np.int32))
        self._graph.launch()
