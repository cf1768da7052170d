"""APIs of GPUs that take kernels as source text, one module each; none of them needs TVM.

A module lists its `APIS`. Its packages are imported only when a device is opened.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tunebench import registry
from tunebench.errors import TuneBenchError, remembered
from tunebench.installation import install_hint
from tunebench.runtime.plan import Shader, Triple

Buffer = Any
"""Device memory, as its API has it."""
Kernel = Any
"""A compiled shader, as its API has it."""


@dataclass(frozen=True)
class Call:
    """One launch of a compiled shader."""

    kernel: Kernel
    buffers: Sequence[Buffer]
    blocks: Triple


class Recording(Protocol):
    """Launches that are prepared once and can run many times, in order."""

    def run(self) -> None:
        """Hand the launches to the device; returns before they are done."""
        ...

    def elapsed_ns(self) -> int:
        """Run, wait, and say what the device took from before the first launch to after the last."""
        ...


class ApiDevice(Protocol):
    """One device of a GPU API."""

    name: str  # by its maker
    facts: Mapping[str, Any]  # driver, features and limits, as results keep them
    free_bytes: int  # of device memory, or all of it where the API does not say what is free
    cache_bytes: int  # of the last-level cache; 0 where the API does not say

    def target(self) -> dict[str, Any]:
        """TVM's target for it, as data."""
        ...

    def allocate(self, size_bytes: int) -> Buffer:
        """New device memory, with any content."""
        ...

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy a whole array to the start of a buffer, in order with what runs."""
        ...

    def copy(self, to: Buffer, source: Buffer, size_bytes: int) -> None:
        """Copy the first bytes of a buffer to another, in order with what runs."""
        ...

    def read(self, buffer: Buffer, size_bytes: int) -> np.ndarray:
        """The first bytes of a buffer, uint8, once all that was submitted is done."""
        ...

    def compile(self, shader: Shader) -> Kernel:
        """The shader, ready to launch; RuntimeError with the compiler's words where it is wrong."""
        ...

    def record(self, calls: Sequence[Call], times: int = 1) -> Recording:
        """Prepare launches, all of them so many times."""
        ...

    def wait(self) -> None:
        """Until everything submitted is done."""
        ...


@dataclass(frozen=True)
class Api:
    """A GPU API."""

    name: str
    language: str  # of its shaders
    summary: str
    packages: tuple[str, ...]  # what it imports
    open: Callable[[], ApiDevice]  # TuneBenchError where there is no device


def apis() -> dict[str, Api]:
    """Every API by name."""
    return registry.load(__name__, "APIS", Api)


@remembered
def open_device(name: str) -> ApiDevice:
    """The first device of an API, opened once; TuneBenchError where a package, a driver or a device is missing."""
    api = registry.pick(apis(), name, "API")
    missing = [package for package in api.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TuneBenchError(f"{name} needs {' and '.join(missing)}.", install_hint(name))
    try:
        return api.open()
    except ImportError as error:
        raise TuneBenchError(f"{name} cannot be loaded ({error}).", install_hint(name)) from None
