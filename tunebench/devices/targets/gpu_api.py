"""GPUs through APIs that take kernels as source text, which TVM generates but has no runtime for."""

import sys

from tunebench.spec import TargetPreset

WEBGPU = (("max_num_threads", 256), ("supports_subgroups", 1))
THREADS = (("max_num_threads", 256), ("max_threads_per_block", 256))

TARGETS = (
    TargetPreset("webgpu", "webgpu", "a GPU through WebGPU, on what the system has", WEBGPU, "webgpu", api="webgpu"),
    TargetPreset("vulkan", "webgpu", "a GPU through WebGPU on Vulkan", WEBGPU, "webgpu", api="webgpu"),
    TargetPreset("dawn", "webgpu", "a GPU through WebGPU as Chrome has it: Dawn", WEBGPU, "webgpu", api="dawn"),
    TargetPreset("opencl", "opencl", "a GPU, or a CPU, through OpenCL", THREADS, "opencl", api="opencl"),
    TargetPreset(
        "metal",
        "metal",
        "Apple's GPUs through TVM's Metal runtime",
        (("max_num_threads", 256), ("thread_warp_size", 32)),
        "metal",
        runs_here=sys.platform == "darwin",
        absent="no Metal device",
    ),
)
