"""Rotary embedding and the cache."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Append
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap


def _choices(op: Append, gpu: Gpu) -> Choices:
    if gpu.kind != "cuda" or op.dtype != "float16" or op.dim % 16:
        return {}
    return {"threads": [64, 128, 256], "vector": [2, 4, 8], **overlap(gpu)}


def _build(op: Append, decisions: Decisions) -> PrimFunc:
    b, m, heads, kv_heads, dim, context = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context
    threads, vector = decisions["threads"], decisions["vector"]
    cache = (b, kv_heads, context, dim)
    numbers = [dim, heads, kv_heads, context, m, threads, vector]
    return extern_kernel(
        [
            Param("qkv", (b, m, heads + 2 * kv_heads, dim), "float16"),
            Param("position", (1,), "int32"),
            Param("rope_cos_sin", (2, context, dim // 2), "float32"),
            Param("keys", cache, "float16"),
            Param("values", cache, "float16"),
            Param("q", (b, m, heads, dim), "float16"),
        ],
        (-(-m * (heads + 2 * kv_heads) * dim // 2 // vector // threads), b),
        threads,
        f"tb::append<{', '.join(map(str, numbers))}>",
        ["qkv", "position", "rope_cos_sin", "keys", "values", "q"],
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (Template("cuda-append", Append, "rotation and cache in one kernel", _choices, _build),)
