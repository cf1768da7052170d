"""How prompts are served in chunks of static lengths, by engines of TuneBench's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunebench.errors import TuneBenchError


@dataclass(frozen=True)
class Chunk:
    """A run of `valid` tokens through the function for `size` tokens; the rest of it is padding."""

    size: int
    valid: int


def split_prompt(
    n: int, position: int, chunks: Sequence[int], context: int, chunk_ns: Mapping[int, float]
) -> list[Chunk]:
    """How a prompt of n tokens at `position` is served.

    The last chunk may be padded: the padding's cache entries are beyond every valid token and are overwritten by what
    comes next. Where `chunk_ns` has the expected time of every size, and of a single token, it is the cut that takes
    the least; larger chunks come first. Otherwise a rest of more than half a chunk runs as that chunk, padded, and a
    smaller one goes on to the next smaller chunk, and in the end token by token.
    """
    sizes = tuple(sorted({1, *chunks}, reverse=True))
    if all(size in chunk_ns for size in sizes):
        return list(_fastest(n, context - position, sizes, tuple(chunk_ns[size] for size in sizes)))
    found: list[Chunk] = []
    left = n
    for chunk in sorted(chunks, reverse=True):
        while left >= chunk or (left > chunk // 2 and position + n - left + chunk <= context):
            found.append(Chunk(chunk, min(left, chunk)))
            left -= found[-1].valid
    return found + [Chunk(1, 1)] * left


@functools.lru_cache
def _fastest(n: int, room: int, sizes: tuple[int, ...], times_ns: tuple[float, ...]) -> tuple[Chunk, ...]:
    """The cut of n tokens, before which `room` positions are free, that takes the least time."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of so many tokens that are left: the time, and the size that is next
    for left in range(1, n + 1):
        fitting = [
            (one_ns + best[max(0, left - size)][0], size)
            for size, one_ns in zip(sizes, times_ns, strict=True)
            if size <= left or n - left + size <= room
        ]
        best.append(min(fitting, key=lambda each: each[0]))
    found: list[Chunk] = []
    while n:
        found.append(Chunk(best[n][1], min(n, best[n][1])))
        n -= found[-1].valid
    return tuple(found)


class ChunkedEngine:
    """An engine that runs one step for each chunk. `chunk_ns`, where it is known, decides how prompts are cut."""

    def __init__(self, batch: int, context: int, chunks: Sequence[int]) -> None:
        self._batch, self._context, self._chunks = batch, context, chunks
        self.chunk_ns: Mapping[int, float] = {}

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`, in chunks."""
        self._check_room(position + tokens.shape[1])
        done = 0
        for chunk in split_prompt(tokens.shape[1], position, self._chunks, self._context, self.chunk_ns):
            part = np.zeros((self._batch, chunk.size), np.int32)
            part[:, : chunk.valid] = tokens[:, done : done + chunk.valid]
            self._step(part, position + done, chunk.valid - 1)
            done += chunk.valid

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self._check_room(position + 1)
        self._step(tokens, position, 0)

    def _check_room(self, end: int) -> None:
        if end > self._context:
            raise TuneBenchError(
                f"{end} positions are needed, and the context has {self._context}.", "Raise --context."
            )

    def _step(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        """Process int32 tokens [b, chunk] at `position`; the logits of token `last_token` are kept."""
        raise NotImplementedError


def random_cache(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Plausible contents for the positions that a test at depth does not compute first.

    The bytes of a quantized cache are ordinary numbers as int8 and as e4m3.
    """
    rng = np.random.default_rng(0)
    if dtype.kind in "iu":
        last = (*shape[-2:-1], shape[-1] * dtype.itemsize)
        return np.broadcast_to(rng.integers(16, 56, last, np.uint8).view(dtype), shape).copy()
    return np.broadcast_to(rng.uniform(-1, 1, shape[-2:]).astype(dtype), shape).copy()
