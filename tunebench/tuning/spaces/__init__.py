"""Search spaces, one module per family of kernels, each listing its `SPACES`.

A space says which kernels it is for, and generates one schedule per structural choice; what may vary within
one is left to sampling instructions, so that it can be mutated and its record replayed. A kernel that no
space matches gets MetaSchedule's own rules. TVM is imported only inside the functions that schedule.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunebench import registry

if TYPE_CHECKING:
    from tvm import s_tir

    from tunebench.kernels.operation import Operation
    from tunebench.kernels.templates import Gpu


@dataclass(frozen=True)
class Kernel:
    """What a space may ask about a kernel before it schedules it."""

    blocks: tuple[str, ...]  # the outermost blocks' names, in order
    lanes: int  # float32 elements in a vector register
    cores: int
    dots: Mapping[int, str] = field(default_factory=dict)  # weight bits -> the TensorIntrin for products of bytes
    matrix_dot: str = ""  # the TensorIntrin for products of bytes of two rows, where there is one
    operation: Operation | None = None  # what it computes, where it says so
    gpu: Gpu | None = None  # None on a CPU


@dataclass(frozen=True)
class Space:
    """What may vary in one family of kernels."""

    name: str
    summary: str
    device: str  # the kind of device it is for: cpu or gpu
    matches: Callable[[s_tir.Schedule, Kernel], bool]
    generate: Callable[[s_tir.Schedule, Kernel], list[s_tir.Schedule]]


def spaces() -> dict[str, Space]:
    """Every space by name."""
    return registry.load(__name__, "SPACES", Space)


@functools.cache
def revision() -> str:
    """A digest of the spaces' source: when they change, what was searched through may be searched again."""
    kernels = Path(__file__).parent.parent.parent / "kernels"
    sources = [
        *sorted(Path(__file__).parent.glob("*.py")),
        *sorted(p for p in kernels.rglob("*") if p.suffix in (".py", ".cuh")),
    ]
    return hashlib.sha1(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


def dividing(extent: int, choices: Sequence[int]) -> list[int]:
    """Those of `choices` that divide `extent`; never empty, as 1 is always among them."""
    return [choice for choice in sorted({1, *choices}) if extent % choice == 0]


def sample(sch: s_tir.Schedule, choices: Sequence[int]) -> s_tir.schedule.ExprRV:
    """One of `choices`, all equally likely, as a decision that the search can change."""
    return sch.sample_categorical(list(choices), [1.0 / len(choices)] * len(choices))


def extents(sch: s_tir.Schedule, block: str) -> list[int]:
    """The extents of the loops around a block."""
    return [int(sch.get(loop).extent) for loop in sch.get_loops(sch.get_sblock(block))]


def vector(extent: int, lanes: int) -> int:
    """The longest vector, up to `lanes`, that divides `extent`."""
    return max(size for size in dividing(extent, [2, 4, 8, 16, 32]) if size <= lanes)


def inline_epilogue(sch: s_tir.Schedule, kernel: Kernel, product: str) -> str:
    """Fold all but the last of the element-wise blocks after `product` into it; its name, or `product`."""
    tail = kernel.blocks[kernel.blocks.index(product) + 1 :]
    for name in tail[:-1]:
        sch.compute_inline(sch.get_sblock(name))
    return tail[-1] if tail else product


def unroll_inner(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, skip: int) -> None:
    """Unroll all but the outermost `skip` loops around a block."""
    for loop in sch.get_loops(block)[skip:]:
        sch.unroll(loop)


def split_init(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> None:
    """Move a reduction's initial zeros to before `loop`, in vectors."""
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, loop))[-1])
