"""TuneBench's engine on CUDA: each compiled function recorded once as a graph over static buffers, then replayed."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tunebench.engines.tvm import Loaded, TvmEngine
from tunebench.model.workload import Model
from tunebench.runtime import cuda as cuda_runtime


class CudaEngine(TvmEngine):
    """One executable over loaded weights. A step is three small copies and one launch; nothing waits inside it."""

    def __init__(
        self,
        model: Model,
        executable: relax.VMExecutable | tvm.runtime.Module,
        loaded: Loaded,
        device: tvm.runtime.Device,
    ) -> None:
        super().__init__(model, executable, loaded, device)
        self._stream = cuda_runtime.Stream()
        self._recorded: dict[int, _Recorded] = {}  # by chunk size
        # TVM's pool of scratch memory frees a page when it takes a larger one: let it grow before anything is recorded.
        for chunk in model.workload.chunk_sizes:
            _Inputs(self, chunk, self._stream).run()
        if model.decoder.is_recurrent:  # a step is not to be run twice, as recording one does
            for chunk in model.workload.chunk_sizes:
                tokens = np.zeros((model.workload.batch, chunk), np.int32)
                self._recorded[chunk] = _Recorded(self, chunk, self._stream, (tokens, 0, 0))

    def wait(self) -> None:
        """Until the device is done."""
        self._stream.wait()

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        self.wait()
        return super().logits()

    def _step(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        chunk = tokens.shape[1]
        if chunk not in self._recorded:
            self._recorded[chunk] = _Recorded(self, chunk, self._stream, (tokens, position, last_token))
        recorded = self._recorded[chunk]
        recorded.replay(tokens, position, last_token)
        self._logits = recorded.logits


class _Inputs:
    """One compiled function with its inputs in device memory: zeros at first, at position 0."""

    def __init__(self, engine: CudaEngine, chunk: int, stream: cuda_runtime.Stream) -> None:
        self.stream = stream
        shapes = (engine.model.workload.batch, chunk), (1,), (1,)
        self._inputs = [tvm.runtime.tensor(np.zeros(shape, np.int32), engine.device) for shape in shapes]
        self._function, self._held = engine.function(chunk), engine.loaded
        self.output: tvm.runtime.Tensor | None = None

    def set(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        """Copy new inputs, in order with the stream."""
        for to, value in zip(self._inputs, (tokens, [position], [last_token]), strict=True):
            self.stream.upload(to, np.ascontiguousarray(value, np.int32))

    def step(self) -> None:
        """Launch the function's kernels on the current stream; its logits go to `output`."""
        held = self._held
        result = self._function(*self._inputs, held.rope_cos_sin, held.keys, held.values, held.params)
        self.output = result[0]

    def run(self) -> None:
        """One step, waited for."""
        self.stream.run(self.step)


class _Recorded:
    """One compiled function as a graph over its inputs."""

    def __init__(
        self, engine: CudaEngine, chunk: int, stream: cuda_runtime.Stream, first: tuple[np.ndarray, int, int]
    ) -> None:
        self._inputs = _Inputs(engine, chunk, stream)
        self._inputs.set(*first)  # to run the same step again leaves the cache as it is
        for _ in range(2):  # takes the memory that a recording must not take
            self._inputs.run()
        self._graph = stream.record(self._inputs.step)
        self.logits = self._inputs.output

    def replay(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        """Process int32 tokens [b, chunk]; returns before the device is done."""
        self._inputs.set(tokens, position, last_token)
        self._graph.launch()
