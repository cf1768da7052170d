"""What this machine can do at most: read bandwidth and multiply-add rate, measured with kernels of our own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.target import codegen

from tunebench import stats
from tunebench.measure import Protocol, interleave
from tunebench.tvmscript import quick_parsing

READ_BYTES = 512 << 20  # larger than any last-level cache
ROUNDS = 1 << 20
UNROLL = 4  # vectors of a step of the read
CHAINS = 12  # independent accumulators of a thread, to hide a multiply-add's latency
PROTOCOL = Protocol(warmups=1, samples=7, least_samples=5, budget_s=2.0)


class Probe:
    """The two kernels, compiled once; every call measures anew, as a shared machine changes from minute to minute."""

    def __init__(self, target: tvm.target.Target, threads: int) -> None:
        lanes = int(codegen.llvm_get_vector_width(target)) // 32
        self._shape = (threads, READ_BYTES // (4 * UNROLL * lanes) // threads, UNROLL * lanes)
        self._chains = (threads, CHAINS, lanes)
        with quick_parsing():
            read, flops = _read_kernel(*self._shape), _flops_kernel(threads, lanes)
        self._read, self._flops = _compile(read, target), _compile(flops, target)

    def __call__(self) -> dict[str, float]:
        """Bytes read per second from memory, and float32 operations per second (a multiply-add counts as two)."""
        data = tvm.runtime.tensor(np.ones(self._shape, np.float32))
        sums = tvm.runtime.tensor(np.zeros((self._shape[0], self._shape[2]), np.float32))
        out = tvm.runtime.tensor(np.ones(self._chains, np.float32))
        arms = {"read": lambda: self._read(data, sums), "flops": lambda: self._flops(out)}
        times = {name: stats.median(taken.samples_ns) for name, taken in interleave(arms, PROTOCOL).items()}
        return {
            "read_bytes_per_s": 4e9 * float(np.prod(self._shape)) / times["read"],
            "flops_per_s": 2e9 * ROUNDS * float(np.prod(self._chains)) / times["flops"],
        }


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
