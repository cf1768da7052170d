"""What a device of a GPU API can do at most: the rate of a kernel that copies within its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunebench import stats
from tunebench.kernels import shader_dialect
from tunebench.kernels.shader_dialect import Param
from tunebench.runtime.apis import ApiDevice, Call
from tunebench.timing import Samples

COPY_BYTES = 64 << 20  # every API takes buffers of this size
COPIES = 16  # between different buffers in one sample
COPY = "copy_bytes_per_s"
THREADS = 256
BODY = f"  let i : u32 = bid * {THREADS}u + tid;\n  y[i] = x[i];"
BUFFERS = (Param("x", "vec4u"), Param("y", "vec4u", True))


class ApiProbe:
    """Copies as an arm of a measurement, by wall-clock; their number makes the wait for them small.

    A kernel copies, as APIs may hand their own copies to a unit that is slower than the memory.
    """

    def __init__(self, device: ApiDevice) -> None:
        self._device = device
        language = shader_dialect.Language(shader_dialect.LANGUAGES[str(device.target()["kind"])])
        kernel = device.compile(shader_dialect.shader(language, BUFFERS, THREADS, BODY))
        buffers = [device.allocate(COPY_BYTES) for _ in range(4)]
        blocks = (COPY_BYTES // (16 * THREADS), 1, 1)
        pairs = [(buffers[i % 4], buffers[(i + 1) % 4]) for i in range(COPIES)]
        self._recording = device.record([Call(kernel, pair, blocks) for pair in pairs])
        self.held_bytes = len(buffers) * COPY_BYTES
        self.arms: dict[str, Callable[[], object]] = {COPY: self._copy}
        self._copy()

    def _copy(self) -> None:
        self._recording.run()
        self._device.wait()

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Bytes read and written per second."""
        return {COPY: 1e9 * 2 * COPIES * COPY_BYTES / stats.median(taken[COPY].samples_ns)}
