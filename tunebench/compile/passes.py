"""The pass lists: one prefix that tuning and compiling share, the default schedule, and the tail.

Records match kernels by their structure after the prefix, so nothing but `prefix` may touch a kernel before
it is looked up (apache/tvm #19385 shows what happens otherwise).
"""

from types import ModuleType
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.relax.backend.cuda import pipeline as cuda_pipeline
from tvm.s_tir import dlight
from tvm.target import codegen

from tunebench import environment
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates
from tunebench.kernels.operation import Group, Matmul, Route
from tunebench.kernels.tvmscript import import_intrinsics
from tunebench.spec import TargetPreset

DLIGHT = (
    dlight.gpu.Matmul,
    dlight.gpu.GEMV,
    dlight.gpu.Reduction,
    dlight.gpu.GeneralReduction,
    dlight.gpu.Fallback,
)
"""Its rules for GPUs, in the order that TVM's own pipeline tries them."""


def tvm_target(preset: TargetPreset, threads: int) -> tvm.target.Target:
    """TVM's target for a preset, on a CPU with the number of threads that kernels may use."""
    attrs: dict[str, object] = {"kind": preset.kind, **dict(preset.attrs)}
    if preset.tag:
        attrs |= dict(tvm.target.Target(preset.tag).attrs)
    if preset.kind == "cuda" and "arch" not in attrs:
        attrs["arch"] = environment.cuda_arch()
    if "arch" in attrs:  # DLight sees no tensor cores in an sm_90a
        attrs["arch"] = str(attrs["arch"]).rstrip("af")
    if preset.device == "cpu":
        attrs["num-cores"] = threads
        attrs.setdefault("mcpu", codegen.llvm_get_system_cpu())
    return tvm.target.Target(attrs)


def prefix(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The module with every operator a kernel, fused: what tasks are extracted from and records apply to."""
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),
    ]
    with target:
        return tvm.ir.transform.Sequential(passes)(mod)


def tail(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """From scheduled kernels to what the virtual machine runs, as TVM's own pipeline for the target ends."""
    pipeline: ModuleType = cpu_pipeline if is_cpu(target) else cuda_pipeline
    passes = pipeline.dataflow_lower_passes(target)
    passes += pipeline.finalize_passes(target)
    with target:
        return tvm.ir.transform.Sequential(passes)(mod)


def task_module(func: tirx.PrimFunc) -> tvm.IRModule:
    """A kernel on its own, without what its place in the model put on it: the form that records are keyed by."""
    plain = func.without_attr("global_symbol") if func.attrs and "global_symbol" in func.attrs else func
    if plain.attrs and "op_pattern" in plain.attrs:
        plain = plain.without_attr("op_pattern")
    return tvm.IRModule({"main": plain.with_attr("global_symbol", "main")})


def is_cpu(target: tvm.target.Target) -> bool:
    """Whether a target's kernels run on a CPU."""
    return "cpu" in target.keys


def default_schedule(mod: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """What TVM's pipeline for the target does with a kernel.

    On a GPU that is DLight; on a CPU it is nothing, but never an unpacked matrix in memory.
    """
    if not is_cpu(target):
        operation = gpu_kernels.operation(mod["main"])
        rules: tuple[Any, ...] = DLIGHT
        if isinstance(operation, Matmul):
            import_intrinsics()  # takes seconds
        if isinstance(operation, Route | Group):  # several results: rules for reductions would keep all but the last
            rules = DLIGHT[-1:]
        with target:
            return dlight.ApplyDefaultSchedule(*(rule() for rule in rules))(tvm.IRModule(dict(mod.functions_items())))
    sch = s_tir.Schedule(mod)
    for name in ("dequantize", "unpack", "group_scale", "group_zero", "group_min"):
        if has_block(sch, name):
            sch.compute_inline(sch.get_sblock(name))
    if has_block(sch, "dot"):  # nor a sum for each of its groups
        dot = sch.get_sblock("dot")
        sch.compute_at(dot, sch.get_loops(sch.get_consumers(dot)[0])[-1])
    return sch.mod


def realize(mod: tvm.IRModule) -> tvm.IRModule:
    """A scheduled kernel as it is compiled: where its schedule chose a template, that template's kernel."""
    return templates.realize(mod, gpu_kernels.operation(mod["main"]))


def has_block(sch: s_tir.Schedule, name: str) -> bool:
    """Whether the kernel being scheduled has an outermost block of that name."""
    return name in block_names(sch)


def block_names(sch: s_tir.Schedule) -> list[str]:
    """The names of a kernel's outermost blocks, in order."""
    return [str(sch.get(block).name_hint) for block in sch.get_child_blocks(sch.get_sblock("root"))]
