"""Workload (+ database) -> something the virtual machine runs, with its coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from tunebench import lowering, templates
from tunebench.database import replay, task_key


@dataclass(frozen=True)
class Compiled:
    """An executable and which of its kernels are tuned."""

    executable: relax.VMExecutable
    tuned: Mapping[str, str]  # task key -> where its kernel comes from, tuned or library
    planned_bytes: int  # storage that TVM's planner sets aside for the function that needs most


def compile_model(
    mod: tvm.IRModule, target: tvm.target.Target, records: Mapping[str, ms.database.TuningRecord]
) -> Compiled:
    """Compile a module after the prefix; kernels without a record get their default schedule."""
    scheduled = tvm.IRModule(dict(mod.functions_items()))
    tuned: dict[str, str] = {}
    for gv, func in mod.functions_items():
        if not isinstance(func, tvm.tirx.PrimFunc):
            continue
        kernel = lowering.task_module(func)
        key = task_key(kernel)
        if key in records:
            tuned[key] = templates.source(records[key].trace)
            new = lowering.realize(replay(kernel, records[key]))
        else:
            new = lowering.default_schedule(kernel, target)
        scheduled.update_func(gv, new["main"].with_attr("global_symbol", gv.name_hint))
    lowered = lowering.tail(scheduled, target)
    planned = max(map(_planned_bytes, lowered.functions.values()))
    return Compiled(tvm.compile(lowered, target=target, relax_pipeline=None), tuned, planned)


def _planned_bytes(func: tvm.ir.BaseFunc) -> int:
    """Of all storage that a function's virtual machine allocates."""
    sizes: list[int] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.vm.alloc_storage"):
            sizes.append(math.prod(int(extent) for extent in expr.args[0].values))

    if isinstance(func, relax.Function):
        relax.analysis.post_order_visit(func, visit)
    return sum(sizes)
