"""What can prefill and decode on a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from tunebench.spec import EngineName

OWN = {
    EngineName.TVM: "TuneBench's own on the target, default or tuned; "
    "webgpu, dawn and opencl are its names on those targets",
    EngineName.WEBGPU: "a plan through wgpu-native, on target webgpu",
    EngineName.DAWN: "a plan through Dawn on Node.js, on target dawn",
    EngineName.OPENCL: "a plan through pyopencl, on target opencl",
    EngineName.BROWSER: "a plan in a web browser, on target webgpu",
}
"""TuneBench's own engines by name; any of the first four stands for the one that a target has."""
Weights = Iterable[tuple[str, np.ndarray]]
"""Every parameter by name, in the scheme's stored form: a matrix's parts one after the other."""


class Engine(Protocol):
    """A loaded model. Calls may return before the device is done."""

    @property
    def weight_bytes(self) -> int:
        """All weights in device memory."""
        ...

    def prefill(self, tokens: np.ndarray, position: int) -> object:
        """Process int32 tokens [b, n] that stand at `position`; the last one's logits are kept."""
        ...

    def decode(self, tokens: np.ndarray, position: int) -> object:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        ...

    def wait(self) -> None:
        """Until the device is done with every call so far."""
        ...

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        ...
