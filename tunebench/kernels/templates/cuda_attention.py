"""Attention over the cache: one token split over positions, a prefill chunk on tensor cores."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Attention
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap


def _params(op: Attention) -> list[Param]:
    tokens = (op.b, op.m, op.heads, op.dim)
    cache = (op.b, op.kv_heads, op.context, op.dim)
    return [
        Param("q", tokens, "float16"),
        Param("keys", cache, "float16"),
        Param("values", cache, "float16"),
        Param("position", (1,), "int32"),
        Param("out", tokens, "float16"),
    ]


def _serves(op: Attention, gpu: Gpu) -> bool:
    return gpu.kind == "cuda" and gpu.arch >= 80 and op.dtype == "float16" and op.dim in (64, 128)


def _one_choices(op: Attention, gpu: Gpu) -> Choices:
    if not _serves(op, gpu) or op.m != 1 or op.heads // op.kv_heads > 8:
        return {}
    splits = [2, 4, 8, 16] if gpu.arch >= 90 else [1]
    return {"splits": splits, "warps": [4, 8], "positions": [2, 4], **overlap(gpu)}


def _one_build(op: Attention, decisions: Decisions) -> PrimFunc:
    splits, warps = decisions["splits"], decisions["warps"]
    numbers = [op.dim, op.heads, op.kv_heads, op.context, splits, warps, decisions["positions"]]
    return extern_kernel(
        _params(op),
        (splits, op.b * op.kv_heads),
        32 * warps,
        f"tb::attend_one<{', '.join(map(str, numbers))}>",
        ["q", "keys", "values", "position", "out"],
        cluster=splits,
        early=bool(decisions["overlap"]),
    )


def _chunk_choices(op: Attention, gpu: Gpu) -> Choices:
    if not _serves(op, gpu) or op.m % 16:
        return {}
    return {"warps": [w for w in (1, 2, 4, 8) if op.m % (16 * w) == 0], "keys": [32, 64], **overlap(gpu)}


def _chunk_build(op: Attention, decisions: Decisions) -> PrimFunc:
    warps, m = decisions["warps"], op.m
    numbers = [op.dim, op.heads, op.kv_heads, op.context, m, warps, decisions["keys"]]
    return extern_kernel(
        _params(op),
        (m // (16 * warps), op.b * op.heads),
        32 * warps,
        f"tb::attend_piece<{', '.join(map(str, numbers))}>",
        ["q", "keys", "values", "position", "out"],
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (
    Template("cuda-attend-one", Attention, "one token, positions split over a cluster", _one_choices, _one_build),
    Template("cuda-attend-piece", Attention, "16 tokens a warp on tensor cores", _chunk_choices, _chunk_build),
)
