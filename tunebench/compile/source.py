"""Kernels -> source text and launches: what TVM would have handed to its own runtime of a GPU.

A kernel is compiled as ever; its sources, the buffers in the order of their arguments and the numbers of thread blocks
are kept. Where a schedule chose a template that is written in the target's language, that is the source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir.instrument import pass_instrument

from tunebench.compile import fp16_storage, passes
from tunebench.dtypes import numpy_dtype
from tunebench.kernels import templates
from tunebench.kernels.gpu import operation
from tunebench.runtime.plan import Language, Launch, Program, Shader, Triple

LANGUAGES: Mapping[str, Language] = {"webgpu": "wgsl", "opencl": "opencl", "metal": "metal"}
"""By TVM's target kind, the language of its kernels."""
LAUNCH = tvm.ir.Op.get("tirx.call_ffi_kernel")
FUNCTION = "// Function: "
WRITES = "paramWriteAccess:"


def program(mod: tvm.IRModule, target: tvm.target.Target) -> Program:
    """A scheduled kernel as source; whatever code generation raises where it cannot be."""
    written = templates.written(mod, operation(mod["main"]), templates.gpu_of(target))
    if written:
        return written
    mod = passes.realize(mod)
    widen = target.kind.name == "opencl" and "half" not in target.keys
    if widen:
        mod = fp16_storage.widened(mod)
    split = _Split()
    with tvm.transform.PassContext(instruments=[split]):
        library = tvm.compile(mod, target=target)
    (module,) = library.mod.imports
    calls, scratch = _calls(split.mod["main"])
    source = str(module.inspect_source(""))
    if widen:
        source = fp16_storage.with_conversions(source)
    sources = _by_kernel(source) if target.kind.name == "webgpu" else {}  # elsewhere they share what is above them
    writes = _writes(str(module.inspect_source("func_info")))
    shaders = {
        name: Shader(
            name, sources.get(name, source), _triple(extents, "threadIdx"), writes.get(name, (True,) * len(buffers))
        )
        for name, buffers, extents in calls
    }
    launches = tuple(Launch(name, buffers, _triple(extents, "blockIdx")) for name, buffers, extents in calls)
    return Program(shaders, launches, scratch)


@pass_instrument
class _Split:
    """Keeps the module as it is when device kernels have been split from their host."""

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        if info.name == "tirx.SplitHostDevice":
            self.mod = mod


def _by_kernel(source: str) -> dict[str, str]:
    """Each kernel's source on its own."""
    found: dict[str, str] = {}
    for part in source.split(FUNCTION)[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = found.get(name.strip(), "") + body
    return found


def _triple(extents: Mapping[str, int], axis: str) -> Triple:
    x, y, z = (extents.get(f"{axis}.{each}", 1) for each in "xyz")
    return x, y, z


def _writes(func_info: str) -> dict[str, tuple[bool, ...]]:
    """Whether a kernel writes each argument, by kernel, where TVM says so."""
    found = {}
    for name, facts in json.loads(func_info or "{}").items():
        for tag in facts["launch_param_tags"]:
            if tag.startswith(WRITES):
                found[name] = tuple(map(bool, json.loads(tag.removeprefix(WRITES))))
    return found


_Call = tuple[str, tuple[int, ...], dict[str, int]]


def _calls(host: tirx.PrimFunc) -> tuple[list[_Call], tuple[int, ...]]:
    """The launches in a host function: kernel, buffers by place, extents; and the bytes of its scratch buffers."""
    places: dict[Any, int] = {param: i for i, param in enumerate(host.params)}
    scratch: list[int] = []
    calls: list[_Call] = []

    def allocated(node: tirx.AllocBuffer) -> None:
        places[node.buffer] = len(places)
        size = math.prod(int(extent) for extent in node.buffer.shape)
        scratch.append(size * numpy_dtype(str(node.buffer.dtype)).itemsize)

    def viewed(node: tirx.DeclBuffer) -> None:
        views[node.buffer] = node.data.args[0]

    def place(data: tvm.ir.Call) -> int:
        buffer = data.args[0]
        while buffer in views:
            buffer = views[buffer]
        return places[buffer]

    def called(node: tvm.ir.Call) -> None:
        if node.op == LAUNCH:
            tags = [str(tag) for tag in node.attrs.launch_params]
            name, *buffers = node.args[: -len(tags)]
            extents = dict(zip(tags, map(int, node.args[-len(tags) :]), strict=True))
            calls.append((str(name.value), tuple(map(place, buffers)), extents))

    views: dict[Any, Any] = {}
    walks = [(tirx.AllocBuffer, allocated), (tirx.DeclBuffer, viewed), (tvm.ir.Call, called)]
    tvm_ffi.structural_walk(host.body, walks, order="pre")
    return calls, tuple(scratch)
