"""Products on Hopper's warpgroup instructions, for prompts and for a few sequences at once."""

from __future__ import annotations

from itertools import product

from tvm.tirx import PrimFunc

from tunebench.templates import (
    Choices,
    Decisions,
    Gpu,
    Operation,
    Template,
    extern_kernel,
    overlap,
    product_call,
    product_params,
    serves,
)

HOPPER = 90
FEWEST_ROWS = 2
STEP = 64  # along k, of a warpgroup
MANY = 128  # threads' registers limit how many sums a warpgroup may hold: 64 outputs of so many rows
DIGITS = (1000, 100, 10, 1)  # a tile as one number: rows, warpgroups side by side, those that share k, blocks at once


def _tiles(op: Operation) -> list[tuple[int, int, int, int]]:
    """Rows of x, warpgroups side by side, warpgroups that share k, blocks on a multiprocessor at once."""
    m, n, k = op["m"], op["n"], op["k"]
    if m <= 32:
        rows = next(size for size in (8, 16, 32) if m <= size)
        every = product([rows], (1, 2), (1, 2, 4), (1,))
    else:
        every = product([size for size in (64, MANY) if m % size == 0], (1, 2, 4), (1,), (1, 2))
    found = []
    for tile in every:
        tall, across, along, blocks = tile
        crowded = across * along * blocks > 4 or (blocks == 1 and across == 2 and tall > 32)
        steps = k // (STEP * along)
        if n % (64 * across) == 0 and k % (STEP * along) == 0 and steps >= _stages(tall)[-1] and not crowded:
            found.append(tile)
    return found


def _stages(rows: int) -> list[int]:
    return [3, 4, 5] if rows > 32 else [3, 4, 6, 8]


def _choices(op: Operation, gpu: Gpu) -> Choices:
    if not serves(op, gpu) or gpu.arch != HOPPER or op["bits"] != 4 or op["m"] < FEWEST_ROWS:
        return {}
    tiles = _tiles(op)
    if not tiles:
        return {}
    numbers = [sum(part * digit for part, digit in zip(tile, DIGITS, strict=True)) for tile in tiles]
    return {"tile": numbers, "stages": _stages(tiles[0][0]), **overlap(gpu)}


def _build(op: Operation, decisions: Decisions) -> PrimFunc:
    rows, rest = divmod(decisions["tile"], DIGITS[0])
    across, along, blocks = rest // 100, rest // 10 % 10, rest % 10
    stages = decisions["stages"]
    step_bytes = along * (rows * 128 + across * 64 * (32 + 4))  # x, weights, scales
    sums_bytes = along * min(rows, 32) * (across * 64 + 4) * 4
    numbers = [op["m"], op["n"], op["k"], rows, across, along, stages]
    return extern_kernel(
        product_params(op),
        (-(-op["m"] // rows), op["n"] // (64 * across)),
        128 * across * along,
        *product_call("warpgroups", numbers, op),
        early=bool(decisions["overlap"]),
        shared_bytes=1024 + max(stages * step_bytes, sums_bytes),
        blocks=blocks,
    )


TEMPLATES = (
    Template("cuda-warpgroup", "matmul", "Hopper: 64 outputs a warpgroup, weights in registers", _choices, _build),
)
