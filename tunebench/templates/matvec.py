"""Products of few rows with a weight matrix, on tensor cores."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from tunebench.templates import (
    Choices,
    Decisions,
    Gpu,
    Operation,
    Template,
    extern_kernel,
    overlap,
    product_params,
    serves,
)

MOST_ROWS = 16
STEP_BYTES = 64  # of one output's weights that a warp reads at once
SHARED_BYTES = 48 << 10
ACROSS = 100  # "warps": this many times the warps side by side, and those that share k


def _choices(op: Operation, gpu: Gpu) -> Choices:
    m, n, k = op["m"], op["n"], op["k"]
    if not serves(op, gpu) or m > MOST_ROWS or k * op["bits"] // 8 % STEP_BYTES or n % 16:
        return {}
    tiles = [t for t in (1, 2) if n % (16 * t) == 0]
    across = [a for a in (1, 2, 4) if n % (16 * tiles[-1] * a) == 0 and (m > 4 or a < 4)]
    fits = SHARED_BYTES // (16 * tiles[-1] * m * 4)
    return {
        "tiles": tiles,
        "warps": [ACROSS * a + along for a in across for along in (2, 4, 8) if a * along <= fits],
        "steps": [1, 2, 4],
        **overlap(gpu),
    }


def _build(op: Operation, decisions: Decisions) -> PrimFunc:
    tiles, (across, along) = decisions["tiles"], divmod(decisions["warps"], ACROSS)
    out = {"float16": "__half", "float32": "float"}[op["out"]]
    numbers = [op["bits"], op["group"] or 32, op["m"], op["n"], op["k"], tiles, across, along, decisions["steps"]]
    return extern_kernel(
        product_params(op),
        (op["n"] // (16 * tiles * across),),
        32 * across * along,
        f"tb::matvec<{', '.join(map(str, numbers))}, {'true' if op['residual'] else 'false'}, {out}>",
        ["x", "w", "scale" if op["bits"] < 16 else "x", "residual" if op["residual"] else "x", "y"],
        early=bool(decisions["overlap"]),
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
