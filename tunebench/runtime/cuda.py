"""What TVM's runtime leaves out on CUDA: graphs, events, copies that do not wait, and the device's memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm.runtime import Tensor, device

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.installation import install_hint
from tunebench.spec import Count

DEVICE = device("cuda", 0)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise TuneBenchError("the CUDA target needs cuda-bindings.", install_hint("cuda")) from None
    return runtime


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of NVIDIA's bindings returned besides its status; a RuntimeError names a bad one."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


class Graph:
    """Work recorded once and replayed as one launch."""

    def __init__(self, stream: Stream, work: Callable[[], object]) -> None:
        rt = stream.rt
        gc.disable()  # a module that is collected while recording would end the recording
        try:
            with stream.current():
                checked(rt.cudaStreamBeginCapture(stream.handle, rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
                try:
                    work()
                finally:
                    graph = checked(rt.cudaStreamEndCapture(stream.handle))
        finally:
            gc.enable()
        self._stream = stream
        self._executable = checked(rt.cudaGraphInstantiate(graph, 0))
        checked(rt.cudaGraphDestroy(graph))
        checked(rt.cudaGraphUpload(self._executable, stream.handle))

    def __del__(self) -> None:
        if hasattr(self, "_executable"):
            self._stream.rt.cudaGraphExecDestroy(self._executable)

    def launch(self) -> None:
        """Replay; returns at once."""
        checked(self._stream.rt.cudaGraphLaunch(self._executable, self._stream.handle))


class Stream:
    """A stream of the first device, on which TVM's kernels can be made to run, with two events to time it."""

    def __init__(self) -> None:
        self.rt = _runtime()
        checked(self.rt.cudaSetDevice(0))
        self.handle = checked(self.rt.cudaStreamCreateWithFlags(self.rt.cudaStreamNonBlocking))
        self._start, self._end = checked(self.rt.cudaEventCreate()), checked(self.rt.cudaEventCreate())

    def current(self) -> Any:
        """A context in which TVM launches on this stream."""
        return tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), int(self.handle))

    def record(self, work: Callable[[], object]) -> Graph:
        """The work as a graph; it must have run once before, so that nothing is allocated while recording."""
        return Graph(self, work)

    def run(self, work: Callable[[], object]) -> None:
        """Run work on this stream and wait for it."""
        with self.current():
            work()
        self.wait()

    def wait(self) -> None:
        """Until everything on the stream is done."""
        checked(self.rt.cudaStreamSynchronize(self.handle))

    def elapsed_ns(self, work: Callable[[], object]) -> float:
        """Device time from before to after work, which is waited for."""
        with self.current():
            checked(self.rt.cudaEventRecord(self._start, self.handle))
            work()
            checked(self.rt.cudaEventRecord(self._end, self.handle))
        checked(self.rt.cudaEventSynchronize(self._end))
        return float(checked(self.rt.cudaEventElapsedTime(self._start, self._end))) * 1e6

    def upload(self, to: Tensor, array: Any) -> None:
        """Copy a small array to the device, in order with the stream; the host goes on at once."""
        kind = self.rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(self.rt.cudaMemcpyAsync(address(to), array.ctypes.data, array.nbytes, kind, self.handle))

    def copy(self, to: Tensor, source: Tensor, size_bytes: int, to_offset: int = 0) -> None:
        """Copy a tensor's first bytes to somewhere in another, in order with the stream."""
        kind = self.rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        checked(self.rt.cudaMemcpyAsync(address(to) + to_offset, address(source), size_bytes, kind, self.handle))


def size_bytes(tensor: Tensor) -> int:
    """Of a tensor's elements."""
    return math.prod(int(extent) for extent in tensor.shape) * numpy_dtype(str(tensor.dtype)).itemsize


def address(tensor: Tensor) -> int:
    """Where a tensor lies in device memory."""
    return int(tensor.data_ptr())


def l2_bytes() -> int:
    """The device's last-level cache."""
    return int(DEVICE.l2_cache_size_bytes or 0)


def bus_id() -> str:
    """Where the device is plugged in, by which NVML knows it; CUDA may number devices otherwise."""
    return bytes(checked(_runtime().cudaDeviceGetPCIBusId(20, 0))).partition(b"\0")[0].decode()


def shared_bytes() -> int:
    """Of a multiprocessor's shared memory, what a block may have that asks for it."""
    rt = _runtime()
    return int(checked(rt.cudaDeviceGetAttribute(rt.cudaDeviceAttr.cudaDevAttrMaxSharedMemoryPerBlockOptin, 0)))


def free_bytes() -> int:
    """Of device memory."""
    rt = _runtime()
    checked(rt.cudaSetDevice(0))
    return int(checked(rt.cudaMemGetInfo())[0])


class DeviceMemory:
    """What this process takes of the device's memory. TVM's pools give nothing back, so what it has is its peak."""

    def __init__(self) -> None:
        free_bytes()  # makes the context, which is not a model's
        self._own, self._before = process_bytes(), used_bytes()

    def taken(self) -> Count:
        """Of this process alone with the context; where its processes are not shown, all that came since the start."""
        own, now = process_bytes(), used_bytes()
        if own is not None and self._own is not None:
            return Count(own, f"NVML, this process alone, of which {self._own >> 20} MiB are the CUDA context")
        if now is None or self._before is None:
            return Count(None, "NVML is not installed")
        return Count(max(0, now - self._before), "NVML, the whole device since the start, beyond the CUDA context")


def process_bytes() -> int | None:
    """Device memory of this process and its children, as NVML counts it; None where it does not show them."""
    try:
        import psutil
        import pynvml

        pynvml.nvmlInit()
        handle = _nvml_handle(pynvml)
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        running += pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
        this = psutil.Process()
        ours = {this.pid, *(child.pid for child in this.children(recursive=True))}
        found = {each.pid: each.usedGpuMemory for each in running if each.pid in ours and each.usedGpuMemory}
    except Exception:  # whatever NVML misses here
        return None
    return sum(found.values()) or None


def _nvml_handle(pynvml: Any) -> Any:
    """The device as NVML knows it: the one that CUDA uses, or the only one where there is no CUDA."""
    try:
        return pynvml.nvmlDeviceGetHandleByPciBusId(bus_id().encode())
    except Exception:
        if pynvml.nvmlDeviceGetCount() != 1:
            raise
        return pynvml.nvmlDeviceGetHandleByIndex(0)


def used_bytes() -> int | None:
    """All device memory in use by anybody, as NVML counts it; None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(_nvml_handle(pynvml)).used)
    except Exception:  # whatever NVML misses here
        return None
