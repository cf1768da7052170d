"""Kernels of CUDA templates on the CPU, thread by thread: their own source, with C++ in place of assembly."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from tunebench.compile import nvrtc
from tunebench.kernels.templates import CUDA_SOURCES

HEADER = Path(__file__).parent / "cuda_on_cpu.hpp"
SOURCES = ("common", "append", "attention", "dequantize", "matvec", "norm", "rows")  # others copy as only Hopper does
REPLACED = ("stream", "constant", "begin", "fresh", "fresh_stream", "fresh_word", "fresh_half", "shared_address")
REPLACED += ("copy_async", "commit", "await", "mma", "mask_or", "cluster_sync", "remote", "load_matrices")
"""What the header has."""
C_TYPES = {"float16": "__half", "float32": "float", "int32": "int", "uint32": "unsigned"}


@dataclass(frozen=True)
class Launch:
    """One launch of a device function."""

    call: str
    args: tuple[str, ...]  # in C++, with buffers by place
    grid: dict[str, int]  # by axis

    def entry(self, i: int) -> str:
        """A C function that runs it over an array of pointers."""
        extents = [self.grid.get(axis, 1) for axis in ("blockIdx.x", "blockIdx.y", "clusterCtaIdx.x", "threadIdx.x")]
        sizes = ", ".join(map(str, extents))
        body = f"run_grid({sizes}, [=] {{ {self.call}({', '.join(self.args)}); }});"
        return f'extern "C" void run{i}(void** given) {{ {body} }}'


def launch(func: tvm.tirx.PrimFunc) -> Launch:
    """What a template's kernel of one launch does."""
    grid: dict[str, int] = {}
    calls: list[tvm.ir.Call] = []

    def called(node: tvm.ir.Call) -> None:
        if node.op == tvm.ir.Op.get("tirx.call_extern"):
            calls.append(node)

    def extent(node: tvm.tirx.AttrStmt) -> None:
        grid[str(node.node.thread_tag)] = int(node.value)

    def cluster(node: tvm.tirx.For) -> None:
        grid[str(node.thread_binding.thread_tag)] = int(node.extent)

    walks = [(tvm.ir.Call, called), (tvm.tirx.AttrStmt, extent), (tvm.tirx.For, cluster)]
    tvm_ffi.structural_walk(func.body, walks, order="pre")
    (call,) = calls
    params = list(func.params)

    def argument(arg: Any) -> str:
        if not isinstance(arg, tvm.ir.Call):
            return f"{float(arg.value)!r}f"
        place = next(i for i, param in enumerate(params) if param.same_as(arg.args[0]))
        return f"static_cast<{C_TYPES[str(params[place].dtype)]}*>(given[{place}])"

    return Launch(str(call.args[0].value), tuple(map(argument, call.args[1:])), grid)


def _without(source: str, name: str) -> str:
    """Source without the device function of a name."""
    head = re.search(rf"^(template <[^\n]*>\n)?[^\n/]*__device__ __forceinline__ [\w ]+ {name}\(", source, re.MULTILINE)
    if head is None:
        raise ValueError(f"there is no device function {name}")
    end = start = source.index("{", head.end())
    depth = 0
    while True:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
        if depth == 0:
            break
    assert start < end
    return source[: head.start()] + source[end:]


def _source() -> str:
    text = "\n".join((CUDA_SOURCES / f"{name}.cuh").read_text() for name in SOURCES)
    for name in REPLACED:
        text = _without(text, name)
    return text


def compiled(funcs: Sequence[tvm.tirx.PrimFunc], folder: Path) -> ctypes.CDLL:
    """A library with `run<i>(pointers)` for each kernel."""
    entries = [launch(func).entry(i) for i, func in enumerate(funcs)]
    path = folder / "kernels.cpp"
    path.write_text("\n".join([HEADER.read_text(), _source(), *entries]))
    includes = [f"-I{each}" for each in nvrtc._includes()]
    flags = ["-std=c++17", "-O1", "-fpermissive", "-w", "-shared", "-fPIC", "-pthread"]
    library = folder / "kernels.so"
    subprocess.run(["g++", *flags, *includes, str(path), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, i: int, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arguments after a kernel ran over copies of them."""
    found = [np.ascontiguousarray(array.copy()) for array in arrays]
    pointers = (ctypes.c_void_p * len(found))(*(array.ctypes.data for array in found))
    library[f"run{i}"](pointers)
    return found
