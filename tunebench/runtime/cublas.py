"""NVIDIA's cuBLAS as a packed function, `tunebench.cublas`, that kernels call on the current stream."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import tvm_ffi

NAME = "tunebench.cublas"
CUDA_R_32F, CUDA_R_16F, COMPUTE_32F, GEMM_DEFAULT = 0, 2, 68, -1
OP_N, OP_T = 0, 1
TO_Y = 2  # `add`: to what y holds
WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises on Hopper; given up front, as a graph that records must not allocate


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception:  # however it says that there is none
        return None


def available() -> bool:
    """Whether cuBLAS is installed."""
    return _library() is not None


class _Handle:
    """cuBLAS's state for this process's first GPU."""

    def __init__(self) -> None:
        from tvm.runtime import empty

        from tunebench.runtime.cuda import DEVICE

        found = _library()
        if found is None:
            raise RuntimeError("cuBLAS is not installed")
        self.library = found
        self._handle = ctypes.c_void_p()
        self.check(self.library.cublasCreate_v2(ctypes.byref(self._handle)))
        self._workspace = empty((WORKSPACE_BYTES,), "uint8", DEVICE)
        self._stream: int | None = None

    def check(self, status: int) -> None:
        """Raise where a call failed."""
        if status:
            raise RuntimeError(f"cuBLAS: status {status}")

    def on_current_stream(self) -> ctypes.c_void_p:
        """The handle, on the stream that TVM launches on."""
        stream = int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)) or 0)
        if stream != self._stream:
            self.check(self.library.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))
            workspace = ctypes.c_void_p(int(self._workspace.data_ptr()))
            self.check(self.library.cublasSetWorkspace_v2(self._handle, workspace, ctypes.c_size_t(WORKSPACE_BYTES)))
            self._stream = stream
        return self._handle


_handle = functools.cache(_Handle)


def _pointer(value: Any, offset_bytes: int) -> ctypes.c_void_p:
    address = value.value if isinstance(value, ctypes.c_void_p) else int(value)
    return ctypes.c_void_p((address or 0) + offset_bytes)


def register() -> None:
    """Make `product` callable from kernels of this process, as `NAME`."""
    tvm_ffi.register_global_func(NAME, product, override=True)


def product(
    x: Any, w: Any, residual: Any, y: Any, m: int, n: int, k: int, width: int, column: int, half: int, add: int
) -> None:
    """y[m, column : column + n] = x[m, k] w[n, k]^T (+ residual there), of float16, summed in float32.

    Pointers to device memory; rows of y and residual are `width` long; `half`: y is float16, else float32.
    Only a float16 y takes a residual. `add`: 0 nothing, 1 the residual, TO_Y what y holds.
    """
    state = _handle()
    handle = state.on_current_stream()
    size = 2 if half else 4
    out = _pointer(y, column * size)
    if add == 1:
        _copy_rows(out, _pointer(residual, column * size), n * size, width * size, m)
    one, beta = ctypes.c_float(1), ctypes.c_float(1 if add else 0)
    state.check(
        state.library.cublasGemmEx(
            *(handle, OP_T, OP_N, n, m, k),
            *(ctypes.byref(one), _pointer(w, 0), CUDA_R_16F, k, _pointer(x, 0), CUDA_R_16F, k),
            *(ctypes.byref(beta), out, CUDA_R_16F if half else CUDA_R_32F, width, COMPUTE_32F, GEMM_DEFAULT),
        )
    )


def _copy_rows(to: ctypes.c_void_p, source: ctypes.c_void_p, row_bytes: int, pitch_bytes: int, rows: int) -> None:
    from cuda.bindings import runtime as rt

    from tunebench.runtime.cuda import checked

    stream = int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", 0)) or 0)
    kind = rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    checked(rt.cudaMemcpy2DAsync(to.value, pitch_bytes, source.value, pitch_bytes, row_bytes, rows, kind, stream))
