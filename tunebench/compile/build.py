"""Workload (+ database) -> something that runs, with its coverage: for TVM's virtual machine, or a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import passes
from tunebench.compile.fusion import Accept
from tunebench.compile.planner import plan_model
from tunebench.compile.tasks import replay, task_key
from tunebench.kernels import templates
from tunebench.model.workload import Model
from tunebench.runtime.plan import Plan
from tunebench.spec import Schedule

Records = Mapping[str, ms.database.TuningRecord]


@dataclass(frozen=True)
class Compiled:
    """A compiled model and which of its kernels are tuned."""

    tuned: Mapping[str, Schedule]  # task key -> where its kernel comes from, tuned or library
    planned_bytes: int  # storage that TVM's planner sets aside beside weights and cache
    executable: relax.VMExecutable | tvm.runtime.Module | None = None  # a module where it was loaded from a library
    plan: Plan | None = None


def compile_model(mod: tvm.IRModule, target: tvm.target.Target, records: Records) -> Compiled:
    """Compile a module after the prefix for the virtual machine."""
    kernels, tuned = _scheduled(mod, target, records)
    scheduled = tvm.IRModule(dict(mod.functions_items()))
    for name, kernel in kernels.items():
        func = passes.realize(kernel)["main"].with_attr("global_symbol", name)
        scheduled.update_func(scheduled.get_global_var(name), func)
    lowered = passes.tail(scheduled, target)
    planned = max(map(_planned_bytes, lowered.functions.values()))
    return Compiled(tuned, planned, executable=tvm.compile(lowered, target=target, relax_pipeline=None))


def compile_plan(
    mod: tvm.IRModule, model: Model, target: tvm.target.Target, records: Records, accept: Accept | None = None
) -> Compiled:
    """Compile a module after the prefix to a plan; `accept` says which fused kernels to use, all without."""
    kernels, tuned = _scheduled(mod, target, records)
    plan = plan_model(mod, model, target, kernels, accept)
    return Compiled(tuned, plan.scratch_bytes, plan=plan)


def _scheduled(
    mod: tvm.IRModule, target: tvm.target.Target, records: Records
) -> tuple[dict[str, tvm.IRModule], dict[str, Schedule]]:
    """Every kernel by name, under its record or by default; and where tuned ones come from, by key."""
    kernels: dict[str, tvm.IRModule] = {}
    tuned: dict[str, Schedule] = {}
    for gv, func in mod.functions_items():
        if not isinstance(func, tvm.tirx.PrimFunc):
            continue
        kernel = passes.task_module(func)
        key = task_key(kernel)
        if key in records:
            tuned[key] = templates.source(records[key].trace)
            kernels[gv.name_hint] = replay(kernel, records[key])
        else:
            kernels[gv.name_hint] = passes.default_schedule(kernel, target)
    return kernels, tuned


def _planned_bytes(func: tvm.ir.BaseFunc) -> int:
    """Of all storage that a function's virtual machine allocates."""
    sizes: list[int] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.vm.alloc_storage"):
            sizes.append(math.prod(int(extent) for extent in expr.args[0].values))

    if isinstance(func, relax.Function):
        relax.analysis.post_order_visit(func, visit)
    return sum(sizes)
