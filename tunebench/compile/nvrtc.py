"""CUDA source -> cubin, through NVRTC, with templates' device code in front and results shared between processes.

A cubin is kept under the digest of its source in a folder that several processes may share: what a build worker
compiled, the process that measures finds there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target

from tunebench.errors import TuneBenchError
from tunebench.installation import install_hint
from tunebench.kernels import templates
from tunebench.runtime.cuda import checked

CALL = "tb::"  # what a call of a template's device function begins with
KERNEL = 'extern "C" __global__'
BOUNDS = r"__launch_bounds__\((\d+)\)"
TYPES = "\n".join(
    f"typedef {c_type} {'u' * unsigned}int{bits}_t;"
    for bits, signed in ((8, "signed char"), (16, "short"), (32, "int"), (64, "long long"))
    for unsigned, c_type in ((0, signed), (1, "unsigned " + signed.removeprefix("signed ")))
)
"""In place of <cstdint>, as NVRTC has no standard library, and NVIDIA's is large."""


@contextlib.contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """In a `with` block TVM compiles CUDA kernels through here, and keeps them in `folder`."""
    importlib.import_module("tvm.support.nvcc")  # which sets its own compiler when it is first imported
    ours = {
        "tvm_callback_cuda_postproc": with_templates,
        "tvm_callback_cuda_compile": functools.partial(_cached, folder),
    }
    before = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in ours}
    for name, function in ours.items():
        tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                tvm_ffi.registry.remove_global_func(name)
            else:
                tvm_ffi.register_global_func(name, function, override=True)


def with_templates(code: str, target: Target) -> str:
    """The source with the device functions that it calls, and with the architecture that it is for."""
    arch = str(target.attrs["arch"])
    head, kernel, rest = code.partition(KERNEL)
    includes = head.index("#ifdef __CUDACC_RTC__"), head.index("\n#endif\n") + len("\n#endif")
    head = head[: includes[0]] + TYPES + head[includes[1] :]
    device = templates.cuda_source() if CALL in rest else ""
    if int(arch.removeprefix("sm_")) >= templates.HOPPER:
        arch += "a"  # its own instructions too; a cubin runs on no other architecture anyway
    return f"// {arch}\n{head}{device}\n{kernel}{_bounded(rest)}"


def _bounded(kernels: str) -> str:
    """Kernels that say how many of their blocks shall fit on a multiprocessor, told to the compiler."""
    at_once = re.escape(templates.AT_ONCE).replace(re.escape("{}"), r"(\d+)")
    found = re.findall(rf"{BOUNDS} (\w+)\([^)]*\) {{[^{{}}]*{at_once}", kernels)
    if len(found) != len(re.findall(at_once, kernels)):
        raise RuntimeError("this TVM prints kernels in a form whose launch bounds cannot be changed")
    for _, name, blocks in found:
        kernels = re.sub(rf"{BOUNDS} {name}\(", rf"__launch_bounds__(\1, {blocks}) {name}(", kernels)
    return kernels


def build(mod: tvm.IRModule, target: Target) -> str:
    """Compile a module's kernels without the CUDA runtime, in a block of `compiling`; their source."""
    with _as_source():
        lib = tvm.compile(mod, target=target)
    sources = [str(part.inspect_source("cuda")) for part in lib.mod.imports if part.kind == "cuda"]
    for source in sources:
        tvm_ffi.get_global_func("tvm_callback_cuda_compile")(source)
    return "\n".join(sources)


@contextlib.contextmanager
def _as_source() -> Iterator[None]:
    """TVM makes no CUDA module, which would compile at once, but keeps the source."""
    before = os.environ.get("TVM_COMPILE_FORCE_FALLBACK")
    os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TVM_COMPILE_FORCE_FALLBACK")
        os.environ.update({} if before is None else {"TVM_COMPILE_FORCE_FALLBACK": before})


def _cached(folder: Path, code: str) -> bytes:
    path = folder / f"{hashlib.sha1(code.encode()).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    cubin = compile_cuda(code)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
    return cubin


def compile_cuda(code: str) -> bytes:
    """A cubin for the architecture that `with_templates` wrote in the first line; RuntimeError with NVRTC's log."""
    nvrtc = _nvrtc()
    arch = code.partition("\n")[0].removeprefix("// ")
    program = checked(nvrtc.nvrtcCreateProgram(code.encode(), b"kernels.cu", 0, None, None))
    options = [f"--gpu-architecture={arch}", "-default-device", "--use_fast_math", "--std=c++17"]
    options += [f"-I{path}" for path in _includes()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
        raise RuntimeError(lines[0] if lines else "NVRTC failed")
    cubin = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def check_installed() -> None:
    """Raise a TuneBenchError where NVRTC or CUDA's headers are missing."""
    _nvrtc()
    _includes()


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError) as error:
        raise TuneBenchError(f"CUDA kernels need NVRTC ({error}).", install_hint("cuda")) from None
    return nvrtc


@functools.cache
def _includes() -> list[Path]:
    """Folders of CUDA's headers: the toolkit's, or those of NVIDIA's wheels."""
    from tvm.support.nvcc import find_cuda_path

    wheels = importlib.util.find_spec("nvidia")
    folders = wheels.submodule_search_locations if wheels else None
    roots = [path for folder in folders or () for path in Path(folder).glob("*")]
    with contextlib.suppress(RuntimeError, OSError):  # where there is no nvcc, or no `which`
        roots.append(Path(find_cuda_path()))
    roots.append(Path("/usr/local/cuda"))
    found = [path for root in roots for path in (root / "include", root / "include" / "cccl") if path.is_dir()]
    if not any((path / "cuda_fp16.h").exists() for path in found):
        raise TuneBenchError("CUDA's headers were not found.", install_hint("cuda"))
    return found
