"""Scales of groups, searched for the least squared error of the weights that they make.

All arrays of weights are float32 [N, groups, weights of a group]; what a group has is float32 [N, groups, 1]. `weights`
[1, groups, weights of a group] says how much each squared error counts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tunebench import environment

Array = np.ndarray
BLOCK = 1 << 16  # weights at a time: what is made of them stays in a core's cache
STEPS = (0.86, 0.92, 0.98, 1.04, 1.1, 1.16)
"""Scales that are tried, as parts of the one that reaches the largest weight; each then fitted to its integers."""


class Fitted(NamedTuple):
    """What a group's integers q mean: (q - zero) * scale + minimum."""

    scale: Array
    zero: Array
    minimum: Array


def in_blocks(make: Callable[[Array], dict[str, Array]], matrix: Array, rows: int = 1) -> dict[str, Array]:
    """`make` of blocks of rows, a multiple of `rows` each, on all cores; the parts one below the other."""
    step = max(BLOCK // matrix.shape[1] // rows, 1) * rows
    blocks = [matrix[start : start + step] for start in range(0, matrix.shape[0], step)]
    with ThreadPoolExecutor(environment.usable_cores()) as pool:
        made = list(pool.map(make, blocks))
    return {name: np.concatenate([parts[name] for parts in made]) for name in made[0]}


def symmetric(groups: Array, zero: int, largest: int, weights: Array | None) -> Fitted:
    """(q - zero) * scale with q from 0 to `largest`; a scale is negative where the other side fits better."""
    size = np.abs(groups)
    top, extreme = size.max(-1, keepdims=True), np.take_along_axis(groups, size.argmax(-1)[..., None], -1)
    zeros = np.full_like(top, zero)
    sides = (np.float32(largest - zero), np.float32(-zero))
    tried = [top / np.float32(min(zero, largest - zero))]
    tried += [extreme / side * np.float32(step) for side in sides for step in STEPS]
    return _best_scale(groups, [(scale, zeros) for scale in tried], largest, weights)


def with_zero(groups: Array, largest: int, weights: Array | None) -> Fitted:
    """(q - zero) * scale with a whole number `zero` of the group: 0 itself is one of the integers."""
    low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
    tried = []
    for step in STEPS:
        scale = (high - low) / np.float32(largest) * np.float32(step)
        zero = np.rint(_over(-low - (1 - np.float32(step)) * (high - low) / 2, scale))
        tried.append((scale, np.clip(zero, 0, largest)))
    return _best_scale(groups, tried, largest, weights)


def _best_scale(groups: Array, tried: list[tuple[Array, Array]], largest: int, weights: Array | None) -> Fitted:
    """Of scales and zeros, those whose integers fit best, each with the scale that fits its integers."""
    found, zero = tried[0]  # what is not finite stays so
    most = np.full_like(found, -1)
    for scale, middle in tried:
        steps = np.clip(np.rint(_over(groups, scale)), -middle, largest - middle)
        shared, square = _sum(steps, groups, weights), _sum(steps, steps, weights)
        fitted = _over(shared, square)
        gain = shared * fitted  # what of the weights' squares the fit explains
        better = gain > most * np.float32(1 + 1e-6)
        found, zero = np.where(better, fitted, found), np.where(better, middle, zero)
        most = np.where(better, gain, most)
    return Fitted(found, zero, np.zeros_like(zero))


def with_minimum(groups: Array, largest: int, weights: Array | None, below_zero: bool = False) -> Fitted:
    """q * scale + minimum; the minimum is no larger than 0 where `below_zero`."""
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    low = np.minimum(low, 0) if below_zero else low
    above = groups - low
    count = _sum(np.ones_like(above), np.ones_like(above), weights)
    total = _sum(above, np.ones_like(above), weights)
    widest = (high - low) / np.float32(largest)
    scale, minimum, least = widest, low, np.full_like(low, np.inf)
    for step in STEPS:
        steps = np.clip(np.rint(_over(above, widest * np.float32(step))), 0, largest)
        fitted, added, error = _line(steps, above, count, total, weights, -low if below_zero else None)
        better = error < least
        scale, minimum = np.where(better, fitted, scale), np.where(better, low + added, minimum)
        least = np.where(better, error, least)
    return Fitted(scale, np.zeros_like(scale), minimum)


def _line(
    steps: Array, above: Array, count: Array, total: Array, weights: Array | None, most: Array | None
) -> tuple[Array, Array, Array]:
    """The line through (steps, above) of least squares, its offset no larger than `most`; its squared error, less what
    is the same for all."""
    first, second = _sum(steps, np.ones_like(steps), weights), _sum(steps, steps, weights)
    shared = _sum(steps, above, weights)
    scale = _over(count * shared - first * total, count * second - first * first)
    added = _over(total - scale * first, count)
    if most is not None:
        capped = added > most
        added = np.where(capped, most, added)
        scale = np.where(capped, _over(shared - added * first, second), scale)
    squares = scale * scale * second + 2 * scale * added * first + added * added * count
    return scale, added, squares - 2 * (scale * shared + added * total)


def _sum(left: Array, right: Array, weights: Array | None) -> Array:
    """Of products over a group, weighted."""
    if weights is not None:
        left = left * weights
    return np.asarray(np.einsum("ngk,ngk->ng", left, right))[..., None]


def _over(left: Array, right: Array) -> Array:
    """left / right, and 0 where right is 0."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    return np.asarray(np.divide(left, right, out=np.zeros(shape, np.float32), where=right != 0))
