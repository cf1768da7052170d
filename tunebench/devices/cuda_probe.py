"""What this machine's GPU can do at most: the rate of a copy, and of a matrix product of cuBLAS."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np
import tvm

from tunebench import stats
from tunebench.runtime import cublas
from tunebench.runtime import cuda as cuda_runtime
from tunebench.timing import Protocol, Samples, interleave

COPY_BYTES = 1 << 30
SIDE = 8192  # of the matrices
COPY, MATRIX = "copy_bytes_per_s", "f16_flops_per_s"
PROTOCOL = Protocol(warmups=1, samples=7, least_samples=5, budget_s=2.0)


class CudaProbe:
    """A copy within device memory and a float16 product, as arms of a measurement; 2.4 GiB of buffers."""

    def __init__(self) -> None:
        device = cuda_runtime.DEVICE
        self._stream = cuda_runtime.Stream()
        source, to = (tvm.runtime.empty((COPY_BYTES,), "uint8", device) for _ in range(2))
        self.held_bytes = 2 * COPY_BYTES
        self._amounts = {COPY: 2.0 * COPY_BYTES}  # read and written
        self.arms: dict[str, Callable[[], object]] = {
            COPY: lambda: self._stream.run(lambda: self._stream.copy(to, source, COPY_BYTES))
        }
        if cublas.available():
            noise = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32).astype(np.float16)
            a, b = (tvm.runtime.tensor(noise, device) for _ in range(2))
            out = tvm.runtime.empty((SIDE, SIDE), "float16", device)
            x, w, y = (ctypes.c_void_p(cuda_runtime.address(tensor)) for tensor in (a, b, out))
            held = (a, b, out)
            self.held_bytes += sum(SIDE * SIDE * 2 for _ in held)
            self._held = held
            self._amounts[MATRIX] = 2.0 * SIDE**3
            self.arms[MATRIX] = lambda: self._stream.run(
                lambda: cublas.product(x, w, x, y, SIDE, SIDE, SIDE, SIDE, 0, 1, 0)
            )

        for call in self.arms.values():  # what a first call loads and takes is not a model's
            call()

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Bytes read and written, and operations, per second; a multiply-add counts as two."""
        return {name: 1e9 * amount / stats.median(taken[name].samples_ns) for name, amount in self._amounts.items()}

    def __call__(self) -> dict[str, float]:
        """The rates, measured now."""
        return self.rates(interleave(self.arms, PROTOCOL))
