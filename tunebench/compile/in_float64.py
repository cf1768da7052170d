"""A kernel's outputs in float64, as it was written, whatever its schedule: what records are verified against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import s_tir
from tvm.target import codegen

from tunebench import environment
from tunebench.compile import passes

SERIAL, VECTORIZED = 0, 2  # of a loop
FLOATS = ("float16", "bfloat16", "float32")


def outputs(mod: tvm.IRModule, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """All arguments of an unscheduled kernel after a run on this CPU, floats as float64; `arrays` stay as they are."""
    cores = environment.usable_cores()
    target = tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "num-cores": cores})
    kernel = tvm.compile(in_parallel(passes.default_schedule(widened(mod), target)), target=target)["main"]
    tensors = [tvm.runtime.tensor(array.astype(_wide(str(array.dtype)))) for array in arrays]
    kernel(*tensors)
    return [np.asarray(tensor.numpy()) for tensor in tensors]


def widened(mod: tvm.IRModule) -> tvm.IRModule:
    """The kernel with every float type replaced, so that nothing is rounded before the end.

    What puts together a float from its bits still makes the float that it made, and what takes one apart gets its bits.
    """
    graph = json.loads(tvm.ir.save_json(mod))
    nodes = graph["nodes"]
    narrow = json.loads(json.dumps(nodes))
    for node in list(nodes):
        if node["type"] == "ir.PrimType":
            node["data"]["dtype"] = _wide(node["data"]["dtype"])
        elif node["type"] == "tirx.For" and node["data"]["kind"] == VECTORIZED:  # so many lanes would not fit
            node["data"]["kind"] = SERIAL
        elif node["type"] == "ir.Call" and nodes[node["data"]["op"]].get("data") == "tirx.reinterpret":
            call, wide = dict(node["data"]), node["data"]["ty"]
            given = [_narrowed(nodes, narrow, place) for place in nodes[call["args"]]["data"]]
            call["args"] = _added(nodes, {"type": "ffi.Array", "data": given})
            call["ty"] = _added(nodes, narrow[wide])
            node |= _cast(wide, _added(nodes, {"type": "ir.Call", "data": call}))
    return tvm.ir.load_json(json.dumps(graph))


def _narrowed(nodes: list[dict[str, Any]], narrow: list[dict[str, Any]], place: int) -> int:
    """The place of an expression as it was typed before: a float is rounded to that."""
    kind = narrow[nodes[place]["data"]["ty"]]
    return _added(nodes, _cast(_added(nodes, kind), place)) if kind["data"]["dtype"] in FLOATS else place


def _added(nodes: list[dict[str, Any]], node: dict[str, Any]) -> int:
    """The place of a new node."""
    nodes.append(node)
    return len(nodes) - 1


def _cast(kind: int, value: int) -> dict[str, Any]:
    return {"type": "prim.Cast", "data": {"span": 0, "ty": kind, "value": value}}


def in_parallel(mod: tvm.IRModule) -> tvm.IRModule:
    """The kernel with the outermost loop of each block on all cores, where its iterations are independent."""
    sch = s_tir.Schedule(mod)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        loops = sch.get_loops(block)
        if loops:
            try:
                sch.parallel(loops[0])
            except s_tir.ScheduleError:
                continue
    return sch.mod


def _wide(dtype: str) -> str:
    return "float64" if dtype in FLOATS else dtype
