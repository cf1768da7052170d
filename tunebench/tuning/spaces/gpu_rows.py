"""Element-wise kernels on a GPU: how many elements a thread has, and how many threads a block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunebench.tuning.spaces import Kernel, Space, dividing, extents, sample

if TYPE_CHECKING:
    from tvm import s_tir


def _matches(sch: s_tir.Schedule, kernel: Kernel) -> bool:
    from tunebench.kernels import templates

    def spatial(name: str) -> bool:
        return all(iteration.iter_type == 0 for iteration in sch.get(sch.get_sblock(name)).iter_vars)

    if kernel.gpu is None or templates.serving(kernel.operation, kernel.gpu):
        return False
    return all(spatial(name) for name in kernel.blocks)


def _generate(sch: s_tir.Schedule, kernel: Kernel) -> list[s_tir.Schedule]:
    for name in kernel.blocks:
        vectors = dividing(extents(sch, name)[-1], [2, 4])
        most = min(kernel.gpu.threads if kernel.gpu else 32, max(32, math.prod(extents(sch, name))))
        threads = [t for t in (32, 64, 128, 256, 512) if t <= most]
        fused = sch.fuse(*sch.get_loops(sch.get_sblock(name)))
        blocks, lanes, vector = sch.split(fused, [None, sample(sch, threads), sample(sch, vectors)])
        sch.bind(blocks, "blockIdx.x")
        sch.bind(lanes, "threadIdx.x")
        sch.vectorize(vector)
    return [sch]


SPACES = (Space("gpu-rows", "element-wise kernels: vector and threads of a block", "gpu", _matches, _generate),)
