"""What all implementations of WebGPU share: a target for TVM, the size of a buffer, bytes in whole words."""

from __future__ import annotations

from typing import Any

import numpy as np

from tunebench.errors import TuneBenchError

LANES = 32  # of the subgroups that kernels are written for
MOST_THREADS = 1024  # of a block, that TVM schedules for


def target(threads: int, shared_bytes: int, lanes: int, **features: bool) -> dict[str, Any]:
    """TVM's target, as data: the limits that its code generator asks for, and as keys what templates may use.

    `lanes` of a subgroup, 0 where there are none or where their number is not fixed.
    """
    subgroups = lanes == LANES
    found = {**features, "lanes32": subgroups}
    return {
        "kind": "webgpu",
        "keys": ["webgpu", "gpu", *(name for name, there in found.items() if there)],
        "max_num_threads": min(MOST_THREADS, threads),
        "max_shared_memory_per_block": shared_bytes,
        "supports_subgroups": subgroups,
    }


def check_size(device: str, size_bytes: int, most: int) -> None:
    """Raise a TuneBenchError where a shader could not be given a buffer of this size."""
    if size_bytes > most:
        raise TuneBenchError(
            f"{device} takes buffers of {most >> 20} MiB, and {size_bytes >> 20} MiB are needed.",
            "Choose fewer bits, a smaller --context, or another model.",
        )


def words(array: np.ndarray) -> np.ndarray:
    """An array's bytes, and zeros up to a multiple of four."""
    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return np.concatenate([data, np.zeros(-data.size % 4, np.uint8)]) if data.size % 4 else data
