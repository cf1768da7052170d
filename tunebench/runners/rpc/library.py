"""A kernel as a library for a device that is reached over RPC.

Beside the kernel, `main`, a library has `step`: one call of `main` on the next of several input sets, so that the
device can time many calls on cold caches without a message between them.

How the library reaches the device, by what its server takes:
  ll   LLVM bitcode that the server compiles in memory: a server with TVM's compiler in it, such as TVM's wheel
  o    an object file that the server links: a server without it needs a C++ compiler on the device
  so   a shared library, linked on this machine by the linker that the user names: Android's app takes nothing else
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import tvm
from tvm import tirx

HELD_BYTES = 1 << 30  # on a device, of the inputs of all kernels together
PROBE_SIZE = 96
RUNTIME = ("llvm.", "TVM", "__tvm")


def build(mod_json: str, sets: int, target: tvm.target.Target, form: str, linker: str, stem: Path) -> Path:
    """Compile a module with one kernel to a library; its path is `stem` with the form's suffix."""
    kernel = tvm.ir.load_json(mod_json)["main"]
    mod = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main"), "step": step(len(kernel.params), sets)})
    library = tvm.compile(mod, target=target).mod
    _check_calls(library)
    path, fresh = stem.with_suffix(f".{form}"), stem.with_suffix(".bc" if form == "ll" else ".new.o")
    library.write_to_file(str(fresh))
    if form == "so":
        from tvm.support import cc

        cc.create_shared(str(path), [str(fresh)], cc=linker)
        fresh.unlink()
    else:  # whatever its name says, bitcode is read as bitcode
        os.replace(fresh, path)
    return path


def _check_calls(library: tvm.runtime.Module) -> None:
    """Raise where the library calls what no system library has: a server that loads it would crash, and stay down."""
    here = ctypes.CDLL(None)
    for name in re.findall(r"^declare [^\n]*@([\w.]+)\(", library.inspect_source("ll"), re.MULTILINE):
        if not name.startswith(RUNTIME) and not hasattr(here, name):
            raise ValueError(f"it calls {name}, which is nowhere")


def step(params: int, sets: int) -> tirx.PrimFunc:
    """`step(turn, *arguments of every set)`: call `main` on the next set; `turn` remembers which that is."""
    turn = tirx.decl_buffer((1,), "int32", "turn")
    arguments = [[tirx.Var(f"set{s}_{p}", "handle") for p in range(params)] for s in range(sets)]
    zero = tirx.const(0, "int32")
    now = tirx.BufferLoad(turn, [zero])
    body = [tirx.BufferStore(turn, tirx.truncmod(now + 1, tirx.const(sets, "int32")), [zero])]
    for number, each in enumerate(arguments):
        call = tirx.Evaluate(tirx.call_cpacked("main", *each))
        body.append(tirx.IfThenElse(tirx.EQ(now, tirx.const(number, "int32")), call, None))
    handles = [handle for each in arguments for handle in each]
    return tirx.PrimFunc([turn, *handles], tirx.SeqStmt(body)).with_attr("global_symbol", "step")


def probe_kernel() -> tvm.IRModule:
    """A fixed product of matrices, on one thread: what devices of one key are compared by."""
    size = PROBE_SIZE
    a, b, out = (tirx.decl_buffer((size, size), "float32", name) for name in ("a", "b", "out"))
    i, j, k = (tirx.Var(name, "int32") for name in ("i", "j", "k"))
    zero = tirx.const(0, "int32")
    total = tirx.BufferLoad(out, [i, j]) + tirx.BufferLoad(a, [i, k]) * tirx.BufferLoad(b, [k, j])
    inner: tirx.Stmt = tirx.BufferStore(out, total, [i, j])
    for variable in (j, k, i):
        inner = tirx.For(variable, zero, tirx.const(size, "int32"), tirx.ForKind.SERIAL, inner)
    return tvm.IRModule({"main": tirx.PrimFunc([a, b, out], inner).with_attr("global_symbol", "main")})
