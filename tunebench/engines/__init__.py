"""Something that can prefill and decode on a device, one module each."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model. Calls return when the device is done."""

    name: str

    def prefill(self, tokens: np.ndarray, position: int) -> object:
        """Process int32 tokens [b, n] that stand at `position`; the last one's logits are kept."""
        ...

    def decode(self, tokens: np.ndarray, position: int) -> object:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        ...

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        ...
