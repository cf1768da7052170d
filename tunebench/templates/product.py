"""Products of many rows with a weight matrix, on tensor cores."""

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
    product_call,
    product_params,
    serves,
)

THREADS = 256
DEPTH = {4: 64, 16: 32}  # by weight bits: as much along k as two buffers of shared memory take


def _choices(op: Operation, gpu: Gpu) -> Choices:
    if not serves(op, gpu) or op["bits"] not in DEPTH or op["k"] % DEPTH[op["bits"]]:
        return {}
    tall, wide = ([size for size in (64, 128) if op[name] % size == 0] for name in ("m", "n"))
    return {"tall": tall, "wide": wide, **overlap(gpu)} if tall and wide else {}


def _build(op: Operation, decisions: Decisions) -> PrimFunc:
    tall, wide = decisions["tall"], decisions["wide"]
    numbers = [op["bits"], op["group"] or 32, op["m"], op["n"], op["k"], tall, wide, DEPTH[op["bits"]]]
    return extern_kernel(
        product_params(op),
        (op["m"] // tall, op["n"] // wide),
        THREADS,
        *product_call("product", numbers, op),
        early=bool(decisions["overlap"]),
    )


TEMPLATES = (Template("cuda-product", "matmul", "many rows: blocks in shared memory, two deep", _choices, _build),)
