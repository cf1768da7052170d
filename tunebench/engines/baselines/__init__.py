"""What can prefill and decode on a device: the interface, and the engines to compare with, one module each.

A module lists its `PEERS`. No peer is imported before it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunebench import registry
from tunebench.engines.base import Engine, Weights
from tunebench.errors import TuneBenchError
from tunebench.installation import install_hint

if TYPE_CHECKING:
    from tunebench.model.workload import Model


@dataclass(frozen=True)
class Peer:
    """An engine to compare with."""

    name: str  # an EngineName, or a new word of a peer that is added here
    summary: str
    packages: tuple[str, ...]  # what it imports
    refuses: Callable[[Model], str]  # why it cannot run a model; empty if it can
    load: Callable[[Model, Weights, int, Path], Engine]  # (model, weights, threads, folder for large files)
    facts: Callable[[], dict[str, object]] = dict  # what rows say of it among what they say of the machine


def peers() -> dict[str, Peer]:
    """Every peer by name."""
    return registry.load(__name__, "PEERS", Peer)


def check_installed(peer: Peer) -> None:
    """Raise a TuneBenchError where a package is missing."""
    missing = [name for name in peer.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TuneBenchError(f"engine {peer.name} needs {' and '.join(missing)}.", install_hint("peers"))
