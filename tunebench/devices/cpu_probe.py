"""What this machine can do at most: read bandwidth and rates of products, measured with kernels of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.target import codegen

from tunebench import environment, stats
from tunebench.kernels import int8_dot
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.timing import Protocol, Samples, interleave

READ_BYTES = 512 << 20  # larger than any last-level cache
ROUNDS = 1 << 20
UNROLL = 4  # vectors of a step of the read
CHAINS = 12  # independent accumulators of a thread, to hide a multiply-add's latency
REPEATS = 16  # calls of a kernel in one sample
READ, FLOPS, INT8 = "read_bytes_per_s", "flops_per_s", "int8_ops_per_s"
PROTOCOL = Protocol(warmups=1, samples=7, least_samples=5, budget_s=2.0)


class Probe:
    """The kernels and their buffers, `READ_BYTES` and little more.

    A shared machine changes from minute to minute, so the kernels are arms of a measurement, in turn with what is
    measured.
    """

    def __init__(self, target: tvm.target.Target, threads: int) -> None:
        environment.set_threads(threads)
        lanes = int(codegen.llvm_get_vector_width(target)) // 32
        shape = (threads, READ_BYTES // (4 * UNROLL * lanes) // threads, UNROLL * lanes)
        chains = (threads, CHAINS, lanes)
        self.held_bytes = 4 * int(np.prod(shape))
        data, sums = _tensor(np.ones(shape, np.float32)), _tensor(np.zeros((threads, shape[2]), np.float32))
        floats = _tensor(np.ones(chains, np.float32))
        instruction = int8_dot.instruction(target, 8)
        with quick_parsing():
            read, flops = _compile(_read_kernel(*shape), target), _compile(_flops_kernel(threads, lanes), target)
            self.arms = {READ: _repeat(lambda: read(data, sums)), FLOPS: _repeat(lambda: flops(floats))}
            self._amounts = {READ: float(self.held_bytes), FLOPS: 2.0 * ROUNDS * np.prod(chains)}
            if instruction:
                lines = (threads, CHAINS, int8_dot.LANES)
                integers = _tensor(np.zeros(lines, np.int32))
                products = _compile(_dot_kernel(threads, instruction), target)
                self.arms[INT8] = _repeat(lambda: products(integers))
                self._amounts[INT8] = 2.0 * ROUNDS * int8_dot.PER_BYTES * np.prod(lines)

    def rates(self, taken: Mapping[str, Samples]) -> dict[str, float]:
        """Bytes read, and operations on float32 and int8, per second; a multiply-add counts as two."""
        return {
            name: 1e9 * REPEATS * amount / stats.median(taken[name].samples_ns)
            for name, amount in self._amounts.items()
        }

    def __call__(self) -> dict[str, float]:
        """The rates, measured now."""
        return self.rates(interleave(self.arms, PROTOCOL))


def _repeat(call: Callable[[], object]) -> Callable[[], object]:
    """A sample long enough to see what a test sees of a machine that others use too."""

    def calls() -> None:
        for _ in range(REPEATS):
            call()

    return calls


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array)


def _compile(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., object]:
    kernel: Callable[..., object] = tvm.compile(tvm.IRModule({"main": func}), target=target)["main"]
    return kernel


def _read_kernel(threads: int, rows: int, width: int) -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def read(data: T.Buffer((threads, rows, width), "float32"), sums: T.Buffer((threads, width), "float32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("read"):
                thread = T.axis.spatial(threads, t)
                T.reads(data[thread, 0:rows, 0:width])
                T.writes(sums[thread, 0:width])
                total = T.sblock_alloc_buffer((width,), "float32")
                for i in T.vectorized(width):
                    total[i] = T.float32(0)
                for row in range(rows):
                    for i in T.vectorized(width):
                        total[i] = total[i] + data[thread, row, i]
                for i in T.vectorized(width):
                    sums[thread, i] = total[i]

    return read


def _flops_kernel(threads: int, lanes: int) -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def flops(out: T.Buffer((threads, CHAINS, lanes), "float32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("flops"):
                thread = T.axis.spatial(threads, t)
                T.reads(out[thread, 0:CHAINS, 0:lanes])
                T.writes(out[thread, 0:CHAINS, 0:lanes])
                chain = T.sblock_alloc_buffer((CHAINS, lanes), "float32")
                for c in T.unroll(CHAINS):
                    for i in T.vectorized(lanes):
                        chain[c, i] = out[thread, c, i]
                for _ in range(ROUNDS):
                    for c in T.unroll(CHAINS):
                        for i in T.vectorized(lanes):
                            chain[c, i] = chain[c, i] * T.float32(0.999) + T.float32(0.001)
                for c in T.unroll(CHAINS):
                    for i in T.vectorized(lanes):
                        out[thread, c, i] = chain[c, i]

    return flops


def _dot_kernel(threads: int, instruction: str) -> tvm.tirx.PrimFunc:
    step = next(each.body for each in int8_dot.INSTRUCTIONS if each.name == instruction)

    @T.prim_func(s_tir=True)
    def products(out: T.Buffer((threads, CHAINS, int8_dot.LANES), "int32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("products"):
                thread = T.axis.spatial(threads, t)
                T.reads(out[thread, 0:CHAINS, 0 : int8_dot.LANES])
                T.writes(out[thread, 0:CHAINS, 0 : int8_dot.LANES])
                chain = T.sblock_alloc_buffer((CHAINS, int8_dot.LANES), "int32")
                for c in T.unroll(CHAINS):
                    for i in T.vectorized(int8_dot.LANES):
                        chain[c, i] = out[thread, c, i]
                for r in range(ROUNDS):
                    for c in T.unroll(CHAINS):
                        chain[c, T.ramp(0, 1, int8_dot.LANES)] = step(
                            chain[c, T.ramp(0, 1, int8_dot.LANES)], T.broadcast(T.uint32(0x07050301), int8_dot.LANES), r
                        )
                for c in T.unroll(CHAINS):
                    for i in T.vectorized(int8_dot.LANES):
                        out[thread, c, i] = chain[c, i]

    return products
