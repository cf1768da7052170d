"""What a device of a GPU API can do at most: the rate of a copy within its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunebench import stats
from tunebench.apis import Device
from tunebench.measure import Samples

COPY_BYTES = 64 << 20  # every API takes buffers of this size
COPIES = 16  # between different buffers in one sample
COPY = "copy_bytes_per_s"


class ApiProbe:
    """Copies as an arm of a measurement, by wall-clock; their number makes the wait for them small."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers = [device.allocate(COPY_BYTES) for _ in range(4)]
        self.held_bytes = len(self._buffers) * COPY_BYTES
        self.arms: dict[str, Callable[[], object]] = {COPY: self._copy}
        self._copy()

    def _copy(self) -> None:
        buffers = self._buffers
        for i in range(COPIES):
            self._device.copy(buffers[(i + 1) % len(buffers)], buffers[i % len(buffers)], COPY_BYTES)
        self._device.wait()

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Bytes read and written per second."""
        return {COPY: 1e9 * 2 * COPIES * COPY_BYTES / stats.median(taken[COPY].samples_ns)}
