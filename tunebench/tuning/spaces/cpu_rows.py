"""Kernels that treat rows, or elements, independently of each other: attention, norms, the gate, the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, sample

if TYPE_CHECKING:
    from tvm import s_tir


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    if len(kernel.blocks) != 1:
        return False
    return all(int(var.iter_type) == 0 for var in sch.get(sch.get_sblock(kernel.blocks[0])).iter_vars)


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    serial = sch.copy()
    designs = [_vectorize(serial, kernel)] if kernel.blocks != ("row",) else []
    return [*designs, _parallel(sch, kernel)]


def _parallel(sch: s_tir.Schedule, kernel: Kernel) -> s_tir.Schedule:
    """All loops as one, in runs of which a thread takes its part; elements in vectors."""
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(kernel.blocks[0])))
    extent = int(sch.get(fused).extent)
    if kernel.blocks == ("row",):
        sch.parallel(fused)
        return sch
    lanes = sample(sch, dividing(extent, [kernel.lanes // 2, kernel.lanes, 2 * kernel.lanes]))
    outer, lane = sch.split(fused, [None, lanes])
    sch.vectorize(lane)
    sch.parallel(outer)
    return sch


def _vectorize(sch: s_tir.Schedule, kernel: Kernel) -> s_tir.Schedule:
    fused = sch.fuse(*sch.get_loops(sch.get_sblock(kernel.blocks[0])))
    lanes = sample(sch, dividing(int(sch.get(fused).extent), [kernel.lanes // 2, kernel.lanes, 2 * kernel.lanes]))
    sch.vectorize(sch.split(fused, [None, lanes])[1])
    return sch


SPACES = (
    Space(
        name="cpu-rows",
        summary="independent rows or elements: in vectors, by one thread or by all",
        device="cpu",
        matches=_matches,
        generate=_generate,
    ),
)
