"""Kernels on Dawn, Chrome's WebGPU: WGSL through its module for Node.js."""

from tunebench.runners.shader import SourceWay

_way = SourceWay("dawn")
start_builder, build, start_measuring = _way.start_builder, _way.build, _way.start_measuring
most_bytes, wait, new_bench = _way.most_bytes, _way.wait, _way.new_bench
