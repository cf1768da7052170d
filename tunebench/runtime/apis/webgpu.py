"""WebGPU through wgpu-native: Vulkan on Linux, Metal on a Mac, Direct3D 12 on Windows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunebench.errors import TuneBenchError
from tunebench.runtime import webgpu_common
from tunebench.runtime.apis import Api, ApiDevice, Buffer, Call
from tunebench.runtime.plan import Shader

MOST_BLOCKS = 65535  # along one axis of a grid
WANTED = ("shader-f16", "subgroup", "subgroup-barrier", "timestamp-query")
BACKENDS = ("Vulkan", "Metal", "DX12")  # not OpenGL, which has no subgroups
ENABLED = "enable subgroups;"  # which naga, other than browsers, takes for granted and does not know as a directive
LANES = """\
@group(0) @binding(0) var<storage, read_write> lanes : array<u32>;
@compute @workgroup_size(%d, 1, 1)
fn main(@builtin(subgroup_size) size : u32) { lanes[0] = size; }
"""
INSTALL = "Install a Vulkan driver, e.g. Mesa's: mesa-vulkan-drivers."
STAGED = 1 << 20  # bytes of a write that are not left waiting for the next launch


class WebGpuDevice:
    """One adapter, with all of its limits and those of `WANTED` that it has."""

    def __init__(self, adapter: Any) -> None:
        import wgpu

        self._wgpu = wgpu
        self.features = frozenset(name for name in WANTED if name in adapter.features)
        self._limits = {key: value for key, value in adapter.limits.items() if key.startswith("max-")}
        self._device = adapter.request_device_sync(
            required_features=sorted(self.features), required_limits=dict(self._limits)
        )
        info = adapter.info
        self.name = str(info["device"])
        backend = str(info["backend_type"])
        self.facts: Mapping[str, Any] = {
            "api": f"WebGPU on {backend}",
            "driver": f"{info['vendor']} {info['description']}".strip(),
            "wgpu": wgpu.__version__,
            "features": sorted(self.features),
        }
        self.free_bytes = self.cache_bytes = 0
        self._fence = self.allocate(4)
        self._timer = _Timer(self._device) if "timestamp-query" in self.features else None
        self.lanes = self._measured_lanes() if "subgroup" in self.features else 0

    def _measured_lanes(self) -> int:
        """Of a subgroup, in blocks of several sizes; 0 if they differ. wgpu-py 0.32 does not say what Vulkan says."""
        found = set()
        for threads in (64, 256):
            out = self.allocate(4)
            shader = Shader("main", LANES % threads, (threads, 1, 1), (True,))
            self.record([Call(self.compile(shader), [out], (1, 1, 1))]).run()
            found.add(int(self.read(out, 4).view(np.uint32)[0]))
        return found.pop() if len(found) == 1 else 0

    def target(self) -> dict[str, Any]:
        """TVM's target: the limits that its code generator asks for."""
        threads = self._limits["max-compute-invocations-per-workgroup"]
        shared_bytes = self._limits["max-compute-workgroup-storage-size"]
        return webgpu_common.target(threads, shared_bytes, self.lanes, half="shader-f16" in self.features)

    def allocate(self, size_bytes: int) -> Buffer:
        """New storage; TuneBenchError where a shader could not be given as much."""
        most = min(self._limits["max-buffer-size"], self._limits["max-storage-buffer-binding-size"])
        webgpu_common.check_size(self.name, size_bytes, most)
        usage = self._wgpu.BufferUsage
        return self._device.create_buffer(
            size=-(-size_bytes // 4) * 4, usage=usage.STORAGE | usage.COPY_DST | usage.COPY_SRC
        )

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array to a buffer."""
        data = webgpu_common.words(array)
        self._device.queue.write_buffer(buffer, 0, data)
        if data.size >= STAGED:
            self._device.queue.submit([])  # what is written waits in host memory until then

    def copy(self, to: Buffer, source: Buffer, size_bytes: int) -> None:
        """Copy between buffers."""
        encoder = self._device.create_command_encoder()
        encoder.copy_buffer_to_buffer(source, 0, to, 0, -(-size_bytes // 4) * 4)
        self._device.queue.submit([encoder.finish()])

    def read(self, buffer: Buffer, size_bytes: int) -> np.ndarray:
        """A buffer's first bytes."""
        data = self._device.queue.read_buffer(buffer, size=-(-size_bytes // 4) * 4)
        return np.frombuffer(data, np.uint8)[:size_bytes].copy()

    def compile(self, shader: Shader) -> Any:
        """A pipeline; bindings are the buffers in order, then TVM's uniform with the number of blocks."""
        layout = self._layout(shader.writes)
        try:
            module = self._device.create_shader_module(code=shader.source.replace(ENABLED, ""))
            stage = {"module": module, "entry_point": shader.entry}
            return self._device.create_compute_pipeline(layout=layout[0], compute=stage), layout[1]
        except self._wgpu.GPUError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RuntimeError("WGSL: " + " ".join(lines)[:400]) from None

    @functools.cache  # noqa: B019  (one device in a process)
    def _layout(self, writes: tuple[bool, ...]) -> tuple[Any, Any]:
        """The pipeline layout and its bind group layout."""
        kinds = ["storage" if written else "read-only-storage" for written in writes] + ["uniform"]
        visible = self._wgpu.ShaderStage.COMPUTE
        entries = [{"binding": i, "visibility": visible, "buffer": {"type": kind}} for i, kind in enumerate(kinds)]
        group = self._device.create_bind_group_layout(entries=entries)
        return self._device.create_pipeline_layout(bind_group_layouts=[group]), group

    @functools.cache  # noqa: B019
    def _last_block(self, value: int) -> Any:
        """The uniform in which TVM's shaders find the last block along x."""
        usage = self._wgpu.BufferUsage
        data = np.array([value, 0, 0, 0], np.uint32)
        return self._device.create_buffer_with_data(data=data, usage=usage.UNIFORM)

    def record(self, calls: Sequence[Call], times: int = 1) -> WebGpuRecording:
        """Bind groups made once; encoding is a few calls for each launch."""
        prepared = []
        for call in calls:
            pipeline, layout = call.kernel
            buffers = [*call.buffers, self._last_block(call.blocks[0] - 1)]
            entries = [{"binding": i, "resource": {"buffer": buffer}} for i, buffer in enumerate(buffers)]
            prepared.append(
                (pipeline, self._device.create_bind_group(layout=layout, entries=entries), _spread(call.blocks))
            )
        return WebGpuRecording(self._device, self._timer, prepared * times)

    def wait(self) -> None:
        """Until the queue is empty."""
        self._device.queue.read_buffer(self._fence)


def _spread(blocks: tuple[int, int, int]) -> tuple[int, int, int]:
    """Blocks along x beyond what a grid may have, along z, where TVM's shaders look for them."""
    x, y, z = blocks
    while x > MOST_BLOCKS:
        x, z = -(-x // 2), z * 2
    return x, y, z


class WebGpuRecording:
    """Launches of one compute pass."""

    def __init__(self, device: Any, timer: _Timer | None, calls: Sequence[tuple[Any, Any, tuple[int, int, int]]]):
        self._device, self._timer, self._calls = device, timer, calls

    def run(self) -> None:
        """Encode and submit."""
        encoder = self._device.create_command_encoder()
        self._encode(encoder.begin_compute_pass())
        self._device.queue.submit([encoder.finish()])

    def elapsed_ns(self) -> int:
        """By the timestamps at the beginning and end of the pass."""
        if self._timer is None:
            raise TuneBenchError("this WebGPU adapter has no timestamps.", "Use another adapter or target.")
        encoder = self._device.create_command_encoder()
        self._encode(encoder.begin_compute_pass(timestamp_writes=self._timer.writes))
        self._timer.resolve(encoder)
        self._device.queue.submit([encoder.finish()])
        return self._timer.read_ns()

    def _encode(self, into: Any) -> None:
        last = None
        for pipeline, group, blocks in self._calls:
            if pipeline is not last:
                into.set_pipeline(pipeline)
                last = pipeline
            into.set_bind_group(0, group)
            into.dispatch_workgroups(*blocks)
        into.end()


class _Timer:
    """Two timestamps on the device."""

    def __init__(self, device: Any) -> None:
        import wgpu

        self._device = device
        self._set = device.create_query_set(type="timestamp", count=2)
        usage = wgpu.BufferUsage
        self._buffer = device.create_buffer(size=16, usage=usage.QUERY_RESOLVE | usage.COPY_SRC)
        self.writes = {"query_set": self._set, "beginning_of_pass_write_index": 0, "end_of_pass_write_index": 1}

    def resolve(self, encoder: Any) -> None:
        encoder.resolve_query_set(self._set, 0, 2, self._buffer, 0)

    def read_ns(self) -> int:
        """Between the two. wgpu counts nanoseconds on every backend."""
        start, end = np.frombuffer(self._device.queue.read_buffer(self._buffer), np.uint64)
        return int(end - start)


@functools.cache
def _choose_backends() -> None:
    """Once: wgpu has one instance in a process, and refuses to be told again."""
    from wgpu.backends.wgpu_native import extras

    extras.set_instance_extras(backends=BACKENDS)


def open_device() -> ApiDevice:
    """The adapter that promises most."""
    import wgpu

    _choose_backends()
    try:
        adapter = wgpu.gpu.request_adapter_sync(power_preference="high-performance")
    except RuntimeError:
        raise TuneBenchError("no WebGPU adapter.", INSTALL) from None
    try:
        return WebGpuDevice(adapter)
    except (RuntimeError, wgpu.GPUError) as error:
        raise TuneBenchError(f"the WebGPU adapter does not open ({error}).", INSTALL) from None


APIS = (Api("webgpu", "wgsl", "wgpu-native: Vulkan, Metal or Direct3D 12", ("wgpu",), open_device),)
