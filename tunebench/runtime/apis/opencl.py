"""OpenCL through pyopencl: any vendor's driver, or PoCL on a CPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunebench.errors import TuneBenchError
from tunebench.runtime.apis import Api, ApiDevice, Buffer, Call
from tunebench.runtime.plan import Shader

PATTERNS = tuple(2**i for i in range(8))  # bytes that a fill takes along, and so need not outlive the call
INSTALL = "Install a driver, e.g. PoCL for CPUs: pocl-opencl-icd."
OPTIONS = ["-cl-std=CL1.2", "-w", "-cl-mad-enable", "-cl-fast-relaxed-math"]


class OpenClDevice:
    """One device with an in-order queue."""

    def __init__(self, device: Any) -> None:
        import pyopencl as cl

        self._cl, self._device = cl, device
        self._context = cl.Context([device])
        self._queue = cl.CommandQueue(self._context)
        self.name = str(device.name).strip()
        self.has_half = "cl_khr_fp16" in device.extensions
        self.is_nvidia = "cl_nv_device_attribute_query" in device.extensions
        self.facts: Mapping[str, Any] = {
            "api": str(device.platform.version).strip(),
            "driver": str(device.driver_version),
            "pyopencl": cl.VERSION_TEXT,
            "extensions": sorted(str(device.extensions).split()),
        }
        self.free_bytes = int(device.global_mem_size)
        self.cache_bytes = int(device.global_mem_cache_size)

    def target(self) -> dict[str, Any]:
        """TVM's target. Its keys say what the device's compiler takes beyond OpenCL C: halves, NVIDIA's assembly."""
        device = self._device
        threads = min(1024, int(device.max_work_group_size))
        extra = ["half"] * self.has_half + ["ptx"] * self.is_nvidia
        return {
            "kind": "opencl",
            "keys": ["opencl", "gpu", *extra],
            "max_num_threads": threads,
            "max_threads_per_block": threads,
            "max_shared_memory_per_block": min(48 << 10, int(device.local_mem_size)),
        }

    def allocate(self, size_bytes: int) -> Buffer:
        """New global memory; TuneBenchError where the device has none left."""
        try:
            return self._cl.Buffer(self._context, self._cl.mem_flags.READ_WRITE, size_bytes)
        except self._cl.Error as error:
            raise TuneBenchError(
                f"{self.name} has no room for {size_bytes >> 20} MiB more ({error}).",
                "Choose fewer bits, a smaller --context, or another model.",
            ) from None

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array to a buffer; a few numbers without waiting for what runs before."""
        array = np.ascontiguousarray(array)
        if array.nbytes in PATTERNS:
            self._cl.enqueue_fill_buffer(self._queue, buffer, array, 0, array.nbytes)
        else:
            self._cl.enqueue_copy(self._queue, buffer, array)

    def copy(self, to: Buffer, source: Buffer, size_bytes: int) -> None:
        """Copy between buffers."""
        self._cl.enqueue_copy(self._queue, to, source, byte_count=size_bytes)

    def read(self, buffer: Buffer, size_bytes: int) -> np.ndarray:
        """A buffer's first bytes."""
        array = np.empty(size_bytes, np.uint8)
        self._cl.enqueue_copy(self._queue, array, buffer)
        return array

    def compile(self, shader: Shader) -> Any:
        """A built program and what to launch of it."""
        return self._build(shader.source), shader

    @functools.cache  # noqa: B019  (one device in a process)
    def _build(self, source: str) -> Any:
        try:
            return self._cl.Program(self._context, source).build(OPTIONS)
        except self._cl.RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if "error" in line]
            raise RuntimeError(f"OpenCL C: {(lines or [str(error)])[0][:400]}") from None

    def record(self, calls: Sequence[Call], times: int = 1) -> OpenClRecording:
        """A kernel object for each launch, its arguments set once."""
        prepared = []
        for call in calls:
            program, shader = call.kernel
            kernel = self._cl.Kernel(program, shader.entry)
            kernel.set_args(*call.buffers)
            sizes = tuple(b * t for b, t in zip(call.blocks, shader.threads, strict=True))
            prepared.append((kernel, sizes, shader.threads))
        return OpenClRecording(self._cl, self._queue, prepared * times, calls)

    def wait(self) -> None:
        """Until the queue is empty."""
        self._queue.finish()


class OpenClRecording:
    """Launches in order. It keeps the buffers, which OpenCL does not."""

    def __init__(
        self,
        cl: Any,
        queue: Any,
        launches: Sequence[tuple[Any, tuple[int, ...], tuple[int, ...]]],
        calls: Sequence[Call],
    ) -> None:
        self._enqueue, self._queue, self._launches = cl.enqueue_nd_range_kernel, queue, launches
        self._held = [call.buffers for call in calls]

    def run(self) -> None:
        """Hand all launches to the queue."""
        enqueue, queue = self._enqueue, self._queue
        for kernel, sizes, threads in self._launches:
            enqueue(queue, kernel, sizes, threads)
        queue.flush()

    def elapsed_ns(self) -> int:
        """By wall-clock: a queue that keeps times takes half as long again for every launch."""
        self._queue.finish()
        start = time.perf_counter_ns()
        self.run()
        self._queue.finish()
        return time.perf_counter_ns() - start


def open_device() -> ApiDevice:
    """A GPU, or else the first device that there is."""
    import pyopencl as cl

    try:
        devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except cl.Error:
        devices = []
    if not devices:
        raise TuneBenchError("no OpenCL device.", INSTALL)
    try:
        return OpenClDevice(max(devices, key=lambda device: device.type == cl.device_type.GPU))
    except cl.Error as error:
        raise TuneBenchError(f"the OpenCL device does not open ({error}).", INSTALL) from None


APIS = (Api("opencl", "opencl", "OpenCL C 1.2 on any vendor's driver", ("pyopencl",), open_device),)
