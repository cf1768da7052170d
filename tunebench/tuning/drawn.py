"""A schedule for each kernel that nobody tuned, where what it computes counts and not how fast.

TVM leaves a CPU's kernels as they were written, a hundred times as slow as any schedule of their space. All of a
space's schedules compute the same, but for the order of sums.
"""

from __future__ import annotations

from tvm.s_tir import meta_schedule as ms

from tunebench.compile.build import Records
from tunebench.tuning import search, spaces
from tunebench.tuning.entry import Entry
from tunebench.tuning.session import Lowered


def drawn(lowered: Lowered) -> Records:
    """A record by key of each kernel that a space of ours is for; none on a GPU, where defaults are fast enough."""
    session = lowered.session
    if session.device.kind == "gpu":
        return {}
    found: dict[str, ms.database.TuningRecord] = {}
    for task in lowered.tasks:
        begun = search.begin(task, Entry(task.name), session.target, session.threads, 0, 1, seed=0)
        designs = list(begun.context.generate_design_space()) if begun.space in spaces.spaces() else []
        if designs:
            workload = ms.database.Workload(task.mod)
            found[task.key] = ms.database.TuningRecord(designs[0].trace, workload, [1.0], session.target, None)
    return found
