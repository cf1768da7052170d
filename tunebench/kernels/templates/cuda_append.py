"""Rotary embedding and the cache."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc

from tunebench.kernels.operation import Append
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap


def _choices(op: Append, gpu: Gpu) -> Choices:
    if gpu.kind != "cuda" or op.dtype != "float16":
        return {}
    vectors = [v for v in (2, 4, 8) if op.rotated // 2 % v == 0 and op.dim // 2 % v == 0]
    if op.norm:  # a head's threads add up, all in one warp
        vectors = [v for v in vectors if 32 % (op.dim // 2 // v) == 0]
    return {"threads": [64, 128, 256], "vector": vectors, **overlap(gpu)} if vectors else {}


def _build(op: Append, decisions: Decisions) -> PrimFunc:
    b, m, heads, kv_heads, dim, context = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context
    threads, vector = decisions["threads"], decisions["vector"]
    cache = (b, kv_heads, context, dim)
    numbers = [
        dim,
        heads,
        kv_heads,
        context,
        m,
        threads,
        vector,
        *([op.rotated, int(bool(op.norm))] * bool(op.extras())),
    ]
    norms = ["query_norm", "key_norm"] if op.norm else []
    return extern_kernel(
        [
            Param("qkv", (b, m, heads + 2 * kv_heads, dim), "float16"),
            Param("position", (1,), "int32"),
            Param("rope_cos_sin", (2, context, op.rotated // 2), "float32"),
            *(Param(name, (dim,), "float16") for name in norms),
            Param("keys", cache, "float16"),
            Param("values", cache, "float16"),
            Param("q", (b, m, heads, dim), "float16"),
        ],
        (-(-m * (heads + 2 * kv_heads) * dim // 2 // vector // threads), b),
        threads,
        f"tb::append<{', '.join(map(str, numbers))}>",
        [
            "qkv",
            "position",
            "rope_cos_sin",
            "keys",
            "values",
            "q",
            *norms,
            *([tirx.const(op.norm, "float32")] * bool(norms)),
        ],
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (
    Template("cuda-append", Append, "rotation and cache in one kernel", _choices, _build, takes=("rotary", "norm")),
)
