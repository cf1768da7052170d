"""A model goes on with a text, a token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from tunebench.engines.base import Engine
from tunebench.errors import TuneBenchError


def generate(
    engine: Engine, tokens: Sequence[int], most: int, temperature: float, seed: int, ends: Collection[int]
) -> Iterator[int]:
    """What comes after `tokens`, up to `most` of them or one of `ends`, which is not among them.

    Each is the most likely one at temperature 0, else drawn from the softmax of the logits over the temperature.
    """
    if not tokens:
        raise TuneBenchError("the prompt has no tokens.", "Write at least a letter.")
    rng = np.random.default_rng(seed)
    engine.prefill(np.array([tokens], np.int32), 0)
    for position in range(len(tokens), len(tokens) + most):
        token = _chosen(engine.logits()[0], temperature, rng)
        if token in ends:
            return
        yield token
        if position + 1 < len(tokens) + most:
            engine.decode(np.array([[token]], np.int32), position)


def _chosen(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature:  # the largest of the logits with Gumbel's noise is a draw from their softmax
        logits = logits / temperature + rng.gumbel(size=logits.shape)
    return int(logits.argmax())
