"""Normalisation of rows."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc

from tunebench.kernels.operation import RmsNorm
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap


def _choices(op: RmsNorm, gpu: Gpu) -> Choices:
    if gpu.kind != "cuda" or op.dtype != "float16" or op.width % 8:
        return {}
    return {"threads": [t for t in (128, 256, 512, 1024) if t * 8 <= op.width or t == 128], **overlap(gpu)}


def _build(op: RmsNorm, decisions: Decisions) -> PrimFunc:
    rows, width, threads = op.rows, op.width, decisions["threads"]
    matrix = Param("x", (rows, width), "float16")
    return extern_kernel(
        [matrix, Param("weight", (width,), "float16"), Param("out", (rows, width), "float16")],
        (rows,),
        threads,
        f"tb::rms_norm<{width}, {threads}>",
        ["x", "weight", "out", tirx.const(op.epsilon, "float32")],
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (Template("cuda-rms-norm", RmsNorm, "one block a row, read once", _choices, _build),)
