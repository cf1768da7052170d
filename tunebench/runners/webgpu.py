"""Kernels on WebGPU: WGSL through wgpu-native, which is Vulkan, Metal or Direct3D 12."""

from tunebench.runners.shader import SourceWay

_way = SourceWay("webgpu")
start_builder, build, start_measuring = _way.start_builder, _way.build, _way.start_measuring
most_bytes, wait, new_bench = _way.most_bytes, _way.wait, _way.new_bench
