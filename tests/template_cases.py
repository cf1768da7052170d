"""Operations for templates: the plain ones, and every extra and every weight that a template may take."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tunebench.kernels.operation import Append, Attention, LayerNorm, Matmul, Operation, RmsNorm
from tunebench.kernels.templates import FLOAT16, INT4
from tunebench.spec import WeightFormat

MATMUL = Matmul(m=1, n=256, k=512, out="float16", residual=True, dtype="float16", weight=INT4)
HEADS = {"heads": 8, "kv_heads": 2, "dim": 64, "context": 128, "dtype": "float16"}
ONE = Attention(b=2, m=1, **HEADS)  # type: ignore[arg-type]
CHUNK = replace(ONE, m=32)
APPEND = Append(b=2, m=3, **HEADS)  # type: ignore[arg-type]
ROWS = {"one row": 1, "few rows": 4, "many rows": 64}


def integers(bits: int, zero: str, group: int, full_range: bool = False) -> WeightFormat:
    """A weight format of integers that templates read."""
    return WeightFormat("integer", bits, "float16", group, zero, full_range=full_range)  # type: ignore[arg-type]


FORMATS = {
    f"{bits}-bit {zero} {group}": integers(bits, zero, group)
    for bits, zero, group in itertools.product((4, 8), ("symmetric", "zero_point", "minimum"), (32, 64, 128))
}
FORMATS |= {f"{bits}-bit full range": integers(bits, "symmetric", 32, True) for bits in (4, 8)}
PRODUCTS: dict[str, Operation] = {
    f"{rows}, {name}": replace(MATMUL, m=m, weight=weight, bias=True, residual=i % 2 == 0)
    for (rows, m), (i, (name, weight)) in itertools.product(ROWS.items(), enumerate(FORMATS.items()))
}
PRODUCTS |= {f"{rows} of floats and bias": replace(MATMUL, m=m, weight=FLOAT16, bias=True) for rows, m in ROWS.items()}
PRODUCTS |= {
    f"{rows} with bias to float32": replace(MATMUL, m=m, bias=True, residual=False, out="float32")
    for rows, m in ROWS.items()
}

_EXTRAS = {
    "scale": {"scale": 0.3},
    "cap": {"softcap": 5.0, "scale": 1.0},
    "window": {"window": 24},
    "sinks": {"sinks": True},
    "all of them": {"scale": 0.3, "softcap": 4.0, "window": 37, "sinks": True},
}
ATTENTION: dict[str, Operation] = {
    f"{name}, {extra}": replace(op, **values)
    for (name, op), (extra, values) in itertools.product({"one token": ONE, "chunk": CHUNK}.items(), _EXTRAS.items())
}
ATTENTION |= {
    f"{name}, heads of {dim}": replace(op, dim=dim, b=1, sinks=True)
    for (name, op), dim in itertools.product({"one token": ONE, "chunk": CHUNK}.items(), (80, 96, 128, 256))
}
ATTENTION |= {
    f"one token, {share} heads a key": replace(ONE, heads=share, kv_heads=1, window=24, sinks=True)
    for share in (7, 12, 16)
}
OTHERS: dict[str, Operation] = {
    "append, partial": replace(APPEND, rotary=16),
    "append, dolly's": replace(APPEND, dim=80, rotary=20),
    "append, norms": replace(APPEND, norm=1e-5),
    "append, norms of wide heads": replace(APPEND, dim=256, norm=1e-5, rotary=128),
    "rms norm, added": RmsNorm(3, 2048, 1e-5, "float16", residual=True),
    "layer norm": LayerNorm(3, 2048, 1e-5, "float16"),
    "layer norm, uneven": LayerNorm(3, 1032, 1e-5, "float16"),
}
EXTRAS = {**PRODUCTS, **ATTENTION, **OTHERS}
