"""What can prefill and decode on a device: the interface, and the engines to compare with, one module each.

A module lists its `PEERS`. TuneBench's own engine is `tunebench.tvm_engine`. No peer is imported before it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tunebench import registry
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from tunebench.workload import Model

OWN = {
    "tvm": "TuneBench's own on the target, default or tuned; webgpu, dawn and opencl are its names on those targets",
    "webgpu": "a plan through wgpu-native, on target webgpu",
    "dawn": "a plan through Dawn on Node.js, on target dawn",
    "opencl": "a plan through pyopencl, on target opencl",
    "browser": "a plan in a web browser, on target webgpu",
}
"""TuneBench's own engines by name; any of the first four stands for the one that a target has."""
Weights = Iterable[tuple[str, np.ndarray]]
"""Every parameter by name, in the scheme's stored form: a matrix's parts one after the other."""


class Engine(Protocol):
    """A loaded model. Calls may return before the device is done."""

    name: str

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


@dataclass(frozen=True)
class Peer:
    """An engine to compare with."""

    name: str
    summary: str
    packages: tuple[str, ...]  # what it imports
    refuses: Callable[[Model], str]  # why it cannot run a model; empty if it can
    load: Callable[[Model, Weights, int, Path], Engine]  # (model, weights, threads, folder for large files)


def peers() -> dict[str, Peer]:
    """Every peer by name."""
    return registry.load("tunebench.engines", "PEERS", Peer)


def check_installed(peer: Peer) -> None:
    """Raise a TuneBenchError where a package is missing."""
    missing = [name for name in peer.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TuneBenchError(
            f"engine {peer.name} needs {' and '.join(missing)}.", "Install it: pip install 'tunebench[peers]'."
        )
