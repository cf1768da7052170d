"""The kernels of a lowered model: which there are, where they run, and what their time adds up to."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import passes
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import int8_dot
from tunebench.kernels.dequantize import LACKS
from tunebench.kernels.operation import OverCache
from tunebench.model.workload import Model, function_name
from tunebench.spec import Phase


@dataclass(frozen=True)
class Task:
    """One kernel to tune."""

    key: str
    name: str
    mod: tvm.IRModule  # as records are keyed by
    calls: Mapping[int, int]  # chunk size -> calls in one chunk

    @functools.cached_property
    def lacks(self) -> str:
        """Which faster kernel there is not for what it computes; empty where it is the best that there is."""
        sch = s_tir.Schedule(self.mod)
        blocks = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
        return next((str(block.annotations[LACKS]) for block in blocks if LACKS in block.annotations), "")


def task_key(mod: tvm.IRModule) -> str:
    """A task's name in a database: the structural hash of its module."""
    return str(tvm_ffi.structural_hash(mod))


def over_cache(mod: tvm.IRModule) -> OverCache | None:
    """What a kernel that works on the KV cache computes; None for other kernels, and for those that are not our own."""
    func = mod["main"]
    found = gpu_kernels.operation(func) or cpu_kernels.over_cache(func)
    return found if isinstance(found, OverCache) else None


def family_key(mod: tvm.IRModule) -> str:
    """What a task has in common with those whose schedules it can take over.

    Of a kernel over the cache that is the operation at any context; every other kernel is a family of its own.
    """
    operation = over_cache(mod)
    return replace(operation, context=0).text() if operation else task_key(mod)


def replay(mod: tvm.IRModule, record: ms.database.TuningRecord) -> tvm.IRModule:
    """A task's module under a record's schedule, which may name the intrinsics of `int8_dot`."""
    int8_dot.register()
    sch = s_tir.Schedule(mod)
    record.trace.apply_to_schedule(sch, remove_postproc=False)
    return sch.mod


def extract(mod: tvm.IRModule, model: Model) -> list[Task]:
    """Every kernel of a module after the prefix, those with equal structure once."""
    kernels = {gv: passes.task_module(func) for gv, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    keys = {gv: task_key(kernel) for gv, kernel in kernels.items()}
    calls: dict[str, Counter[int]] = {key: Counter() for key in keys.values()}
    for chunk in model.workload.chunk_sizes:
        for gv in _called(mod[function_name(chunk)]):
            calls[keys[gv]][chunk] += 1
    first = {keys[gv]: (gv.name_hint, kernel) for gv, kernel in kernels.items()}
    return [Task(key, name, kernel, dict(calls[key])) for key, (name, kernel) in first.items() if calls[key]]


def _called(func: relax.Function) -> list[tvm.ir.GlobalVar]:
    found: list[tvm.ir.GlobalVar] = []
    operators = {tvm.ir.Op.get("relax.call_tir"), tvm.ir.Op.get("relax.call_tir_inplace")}

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op in operators:
            found.append(expr.args[0])

    relax.analysis.post_order_visit(func, visit)
    return found


def phase(chunk: int) -> Phase:
    """The phase that a chunk size belongs to."""
    return "decode" if chunk == 1 else "prefill"


def chunk_ns(tasks: list[Task], chunk: int, time_ns: Callable[[Task], float]) -> float:
    """Estimated kernel time of one chunk."""
    return sum(time_ns(task) * task.calls.get(chunk, 0) for task in tasks)


def shares(tasks: list[Task], chunk: int, time_ns: Callable[[Task], float]) -> dict[str, float]:
    """Each task's share of a chunk's kernel time, by key; only tasks that run in it."""
    whole = chunk_ns(tasks, chunk, time_ns) or 1.0
    return {task.key: time_ns(task) * task.calls[chunk] / whole for task in tasks if chunk in task.calls}
