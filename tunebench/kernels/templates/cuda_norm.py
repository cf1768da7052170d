"""Normalisation of rows."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc

from tunebench.kernels.operation import LayerNorm, RmsNorm
from tunebench.kernels.templates import Choices, Decisions, Gpu, Param, Template, extern_kernel, overlap


def _choices(op: RmsNorm | LayerNorm, gpu: Gpu) -> Choices:
    if gpu.kind != "cuda" or op.dtype != "float16" or op.width % 8:
        return {}
    return {"threads": [t for t in (128, 256, 512, 1024) if t * 8 <= op.width or t == 128], **overlap(gpu)}


def _build(op: RmsNorm | LayerNorm, decisions: Decisions) -> PrimFunc:
    rows, width, threads = op.rows, op.width, decisions["threads"]
    matrix, vector = (rows, width), (width,)
    centered, by_row = isinstance(op, LayerNorm), isinstance(op, RmsNorm) and op.residual
    added = [Param("added", matrix if by_row else vector, "float16")] if centered or by_row else []
    more = f", {str(centered).lower()}, true, {str(by_row).lower()}" if added else ""
    return extern_kernel(
        [Param("x", matrix, "float16"), Param("weight", vector, "float16"), *added, Param("out", matrix, "float16")],
        (rows,),
        threads,
        f"tb::rms_norm<{width}, {threads}{more}>",
        ["x", "weight", "out", tirx.const(op.epsilon, "float32"), *(each.name for each in added)],
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (
    Template("cuda-rms-norm", RmsNorm, "one block a row, read once", _choices, _build, takes=("residual",)),
    Template("cuda-layer-norm", LayerNorm, "one block a row, read once", _choices, _build),
)
