"""Kernels in float16 for devices that can store it but not compute with it, as OpenCL without cl_khr_fp16.

Everything inside is float32; parameters stay float16 in memory, read and written through the functions of `SOURCE`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import PrimType

SOURCE = """\
inline float tb_widen(ushort bits) { return vload_half(0, (const half *)&bits); }
inline ushort tb_narrow(float value) { ushort bits; vstore_half(value, 0, (half *)&bits); return bits; }
"""
HALF, FLOAT = PrimType("float16"), PrimType("float32")
BINARY = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max)


def widened(mod: tvm.IRModule) -> tvm.IRModule:
    """A scheduled kernel without arithmetic in float16, its float16 parameters as uint16."""
    func = mod["main"]
    stored = [str(param.dtype) == "float16" for param in func.params]
    func = tvm_ffi.structural_map(func, (PrimType, lambda each: FLOAT if each == HALF else each))
    func = tvm_ffi.structural_map(func, _retyped())
    new = {
        param: tirx.decl_buffer(param.shape, "uint16", param.name)
        for param, half in zip(func.params, stored, strict=True)
        if half
    }
    stores = list(new.values())

    def load(node: tvm.ir.TensorLoad) -> tirx.Expr:
        if node.source not in stores:
            return node
        return tirx.call_pure_extern("float32", "tb_widen", tirx.BufferLoad(node.source, node.indices))

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        if node.buffer not in stores:
            return node
        bits = tirx.call_pure_extern("uint16", "tb_narrow", node.value)
        return tirx.BufferStore(node.buffer, bits, node.indices)

    maps = [
        (tvm.ir.Var, lambda var: new.get(var, var)),
        (tvm.ir.TensorLoad, load),
        (tirx.BufferStore, store),
    ]
    return tvm.IRModule({"main": tvm_ffi.structural_map(func, maps)})


def with_conversions(source: str) -> str:
    """OpenCL C of a widened kernel, with the conversions in place of TVM's demand for cl_khr_fp16."""
    head, demand, rest = source.partition("#ifdef cl_khr_fp16")
    return f"{head}{SOURCE}{rest.partition('#endif')[2]}" if demand else SOURCE + source


def _retyped() -> list[tuple[object, Callable[[Any], Any]]]:
    """Expressions whose parts became float32, as float32 themselves."""

    def new(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda node: build(node) if node.ty == HALF else node

    return [
        (BINARY, new(lambda node: type(node)(node.a, node.b))),
        (tirx.Cast, new(lambda node: node.value if node.value.ty == FLOAT else tirx.Cast("float32", node.value))),
        (tirx.FloatImm, new(lambda node: tirx.FloatImm("float32", node.value))),
        (tirx.Select, new(lambda node: tirx.Select(node.condition, node.true_value, node.false_value))),
    ]
