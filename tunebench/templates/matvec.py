"""Products of few rows with a weight matrix, on tensor cores."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from tunebench.templates import Choices, Decisions, Gpu, Operation, Template, extern_kernel, product_params, serves

MOST_ROWS = 16
STEP_BYTES = 64  # of one output's weights that a warp reads at once
SHARED_BYTES = 48 << 10


def _choices(op: Operation, gpu: Gpu) -> Choices:
    m, n, k = op["m"], op["n"], op["k"]
    if not serves(op, gpu) or m > MOST_ROWS or k * op["bits"] // 8 % STEP_BYTES or n % 16:
        return {}
    most_tiles = max(tiles for tiles in (1, 2, 4) if n % (16 * tiles) == 0)
    tiles = [r for r in (1, 2, 4) if r <= most_tiles and 16 * r * m * 4 * 8 <= SHARED_BYTES]
    return {
        "tiles": tiles,
        "warps": [2, 4, 8],
        "steps": [1, 2, 4],
        "spread": [0, 1] if m <= 2 and op["bits"] < 16 else [0],
    }


def _build(op: Operation, decisions: Decisions) -> PrimFunc:
    tiles, warps = decisions["tiles"], decisions["warps"]
    out = {"float16": "__half", "float32": "float"}[op["out"]]
    numbers = [op["bits"], op["group"] or 32, op["m"], op["n"], op["k"], tiles, warps, decisions["steps"]]
    flags = ["true" if flag else "false" for flag in (decisions["spread"], op["residual"])]
    return extern_kernel(
        product_params(op),
        (op["n"] // (16 * tiles),),
        32 * warps,
        f"tb::matvec<{', '.join(map(str, [*numbers, *flags, out]))}>",
        ["x", "w", "scale" if op["bits"] < 16 else "x", "residual" if op["residual"] else "x", "y"],
    )


TEMPLATES = (
    Template(
        "cuda-matvec",
        "matmul",
        "1 to 16 rows: 16 outputs a tile of the tensor cores, k shared by warps",
        _choices,
        _build,
    ),
)
