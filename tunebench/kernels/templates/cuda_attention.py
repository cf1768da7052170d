"""Attention over the cache: one token split over positions, a prefill chunk on tensor cores."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import Expr, PrimFunc

from tunebench.kernels.operation import Attention
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap

MOST_DIM = 256  # a position's lanes are one warp
MOST_ROWS = 8  # heads of a block, whose queries lie in registers
WARPS = (4, 8)
SHARED_BYTES = 48 << 10
TAKES = ("scale", "softcap", "window", "sinks")


def _params(op: Attention) -> list[Param]:
    tokens = (op.b, op.m, op.heads, op.dim)
    cache = (op.b, op.kv_heads, op.context, op.dim)
    return [
        Param("q", tokens, "float16"),
        Param("keys", cache, "float16"),
        Param("values", cache, "float16"),
        Param("position", (1,), "int32"),
        *([Param("sinks", (op.heads,), "float32")] if op.sinks else []),
        Param("out", tokens, "float16"),
    ]


def _call(function: str, numbers: list[int], op: Attention) -> tuple[str, list[str | Expr]]:
    """The call of a device function, and its arguments."""
    args: list[str | Expr] = ["q", "keys", "values", "position", "out"]
    if op.extras():
        numbers = [*numbers, op.window, int(bool(op.softcap)), int(op.sinks)]
        args += [tirx.const(value, "float32") for value in (op.scale, op.softcap)]
        args += ["sinks"] if op.sinks else []
    return f"tb::{function}<{', '.join(map(str, numbers))}>", args


def _serves(op: Attention, gpu: Gpu) -> bool:
    return gpu.kind == "cuda" and gpu.arch >= 80 and op.dtype == "float16" and op.dim % 16 == 0 and op.dim <= MOST_DIM


def _rows(op: Attention) -> int:
    """Heads that share keys and a block."""
    share = op.heads // op.kv_heads
    return max(r for r in range(1, MOST_ROWS + 1) if share % r == 0 and _shared_bytes(op, r, WARPS[0]) <= SHARED_BYTES)


def _shared_bytes(op: Attention, rows: int, warps: int) -> int:
    """Of a block of `attend_one`: each warp's mix, the block's, and for each position at work a maximum and a sum."""
    return 4 * rows * ((warps + 1) * op.dim + 2 + 2 * warps * (32 * 8 // op.dim))


def _one_choices(op: Attention, gpu: Gpu) -> Choices:
    if not _serves(op, gpu) or op.m != 1:
        return {}
    splits = [2, 4, 8, 16] if gpu.arch >= 90 else [1]
    warps = [w for w in WARPS if _shared_bytes(op, _rows(op), w) <= SHARED_BYTES]
    return {"splits": splits, "warps": warps, "positions": [2, 4], **overlap(gpu)}


def _one_build(op: Attention, decisions: Decisions) -> PrimFunc:
    splits, warps, rows = decisions["splits"], decisions["warps"], _rows(op)
    numbers = [op.dim, op.heads, op.kv_heads, op.context, splits, warps, decisions["positions"]]
    if op.extras() or rows != op.heads // op.kv_heads:
        numbers.append(rows)
    return extern_kernel(
        _params(op),
        (splits, op.b * op.heads // rows),
        32 * warps,
        *_call("attend_one", numbers, op),
        cluster=splits,
        early=bool(decisions["overlap"]),
    )


def _chunk_choices(op: Attention, gpu: Gpu) -> Choices:
    if not _serves(op, gpu) or op.m % 16:
        return {}
    keys = [each for each in (32, 64) if 2 * 2 * each * (op.dim + 8) <= SHARED_BYTES]
    return {"warps": [w for w in (1, 2, 4, 8) if op.m % (16 * w) == 0], "keys": keys, **overlap(gpu)}


def _chunk_build(op: Attention, decisions: Decisions) -> PrimFunc:
    warps, m = decisions["warps"], op.m
    numbers = [op.dim, op.heads, op.kv_heads, op.context, m, warps, decisions["keys"]]
    return extern_kernel(
        _params(op),
        (m // (16 * warps), op.b * op.heads),
        32 * warps,
        *_call("attend_piece", numbers, op),
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (
    Template(
        "cuda-attend-one", Attention, "one token, positions split over a cluster", _one_choices, _one_build, takes=TAKES
    ),
    Template(
        "cuda-attend-piece", Attention, "16 tokens a warp on tensor cores", _chunk_choices, _chunk_build, takes=TAKES
    ),
)
