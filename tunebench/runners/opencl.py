"""Kernels on OpenCL: OpenCL C through pyopencl, on any vendor's driver."""

from tunebench.runners.shader import SourceWay

_way = SourceWay("opencl")
start_builder, build, start_measuring = _way.start_builder, _way.build, _way.start_measuring
most_bytes, wait, new_bench = _way.most_bytes, _way.wait, _way.new_bench
