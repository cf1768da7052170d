"""The pass lists: one prefix that tuning and compiling share, the default schedule, and the tail.

Records match kernels by their structure after the prefix, so nothing but `prefix` may touch a kernel before
it is looked up (apache/tvm #19385 shows what happens otherwise).
"""

import tvm
from tvm import relax, s_tir, tirx
from tvm.relax.backend.cpu_generic import pipeline
from tvm.target import codegen

from tunebench.spec import TargetPreset


def tvm_target(preset: TargetPreset, threads: int) -> tvm.target.Target:
    """TVM's target for a preset, on a CPU with the number of threads that kernels may use."""
    attrs: dict[str, str | int] = {"kind": preset.kind, **dict(preset.attrs)}
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
    """From scheduled kernels to what the virtual machine runs, as TVM's own CPU pipeline ends."""
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


def default_schedule(mod: tvm.IRModule) -> tvm.IRModule:
    """What TVM's CPU pipeline does with a kernel, which is nothing, but never an unpacked matrix in memory."""
    sch = s_tir.Schedule(mod)
    for name in ("dequantize", "unpack"):
        if has_block(sch, name):
            sch.compute_inline(sch.get_sblock(name))
    if has_block(sch, "dot"):  # nor a sum for each of its groups
        sch.compute_at(sch.get_sblock("dot"), sch.get_loops(sch.get_sblock("matmul"))[-1])
    return sch.mod


def has_block(sch: s_tir.Schedule, name: str) -> bool:
    """Whether the kernel being scheduled has an outermost block of that name."""
    return name in block_names(sch)


def block_names(sch: s_tir.Schedule) -> list[str]:
    """The names of a kernel's outermost blocks, in order."""
    return [str(sch.get(block).name_hint) for block in sch.get_child_blocks(sch.get_sblock("root"))]
