"""Products of few rows with a weight matrix."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Matmul
from tunebench.kernels.templates import (
    Choices,
    Decisions,
    Gpu,
    Template,
    extern_kernel,
    has_tensor_cores,
    overlap,
    product_call,
    product_params,
)

MOST_ROWS = 16
STEP_BYTES = 64  # of one output's weights that a warp reads at once
SHARED_BYTES = 48 << 10
STAGED_BYTES = 1 << 10  # spare: the last step of one row's activations may be a part
IN_MEMORY, STAGED, AHEAD = range(3)  # "x": where a warp finds x when it needs it
WEIGHTS = (16, 4, 8)  # bits
ACROSS = 100  # "warps": this many times the warps side by side, and those that share k


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    m, n, k = op.m, op.n, op.k
    if not has_tensor_cores(op, gpu) or m > MOST_ROWS or k * op.weight.bits // 8 % STEP_BYTES or n % 16:
        return {}
    tiles = [t for t in (1, 2) if n % (16 * t) == 0]
    across = [a for a in (1, 2, 4) if n % (16 * tiles[-1] * a) == 0 and (m > 4 or a < 4)]
    fits = (SHARED_BYTES - STAGED_BYTES) // (16 * tiles[-1] * m * 4)
    warps = [ACROSS * a + along for a in across for along in (2, 4, 8) if a * along <= fits]
    sums = max((w // ACROSS) * (w % ACROSS) for w in warps) * 16 * tiles[-1] * m * 4
    fits_whole = m * k * 2 + sums <= SHARED_BYTES - STAGED_BYTES
    return {
        "tiles": tiles,
        "warps": warps,
        "steps": [1, 2] if m > 1 else [2],
        "x": [IN_MEMORY, STAGED, AHEAD] if op.weight.bits == 4 and fits_whole else [IN_MEMORY, AHEAD],
        **overlap(gpu),
    }


def _build(op: Matmul, decisions: Decisions) -> PrimFunc:
    tiles, (across, along) = decisions["tiles"], divmod(decisions["warps"], ACROSS)
    numbers = [op.weight.bits, op.weight.group or 32, op.m, op.n, op.k, tiles, across, along, decisions["steps"]]
    numbers.append(decisions["x"])
    return _kernel("matvec", numbers, op, 16 * tiles * across, across * along, decisions)


def _row_choices(op: Matmul, gpu: Gpu) -> Choices:
    n, k = op.n, op.k
    if not has_tensor_cores(op, gpu) or op.m != 1 or k % 32 or _held_bytes(op) > SHARED_BYTES - STAGED_BYTES:
        return {}
    rows = [r for r in (1, 2, 4) if n % r == 0]
    warps = [w for w in (4, 8, 16) if n % (rows[-1] * w) == 0]
    return {"rows": rows, "warps": warps, "steps": [2, 4], **overlap(gpu)} if warps else {}


def _held_bytes(op: Matmul) -> int:
    """Of activations in shared memory, and of the sums that minima are multiplied with."""
    sums = 4 * op.k // (128 // op.weight.bits) if op.weight.zero == "minimum" else 0
    return 2 * op.k + sums


def _row_build(op: Matmul, decisions: Decisions) -> PrimFunc:
    rows, warps = decisions["rows"], decisions["warps"]
    numbers = [op.weight.bits, op.weight.group or 32, op.n, op.k, rows, warps, decisions["steps"]]
    return _kernel("rows", numbers, op, rows * warps, warps, decisions)


def _kernel(function: str, numbers: list[int], op: Matmul, outputs: int, warps: int, decisions: Decisions) -> PrimFunc:
    """One block of `warps` for so many outputs."""
    return extern_kernel(
        product_params(op),
        (op.n // outputs,),
        32 * warps,
        *product_call(function, numbers, op),
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (
    Template(
        "cuda-matvec",
        Matmul,
        "1 to 16 rows: 16 outputs a tile of the tensor cores, k shared by warps",
        _choices,
        _build,
        weights=WEIGHTS,
        takes=("bias",),
    ),
    Template(
        "cuda-row",
        Matmul,
        "one row: whole outputs a warp, in half precision",
        _row_choices,
        _row_build,
        weights=WEIGHTS,
        takes=("bias",),
    ),
)
