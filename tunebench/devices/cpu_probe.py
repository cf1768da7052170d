"""What this machine's CPU can do at most: reads and copies of memory, and rates of products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm.script import tirx as T
from tvm.target import codegen

from tunebench import environment
from tunebench.devices.probe import COPY, FLOPS, INT8, READ, Probe, Way, repeated
from tunebench.kernels import int8_dot
from tunebench.kernels.tvmscript import quick_parsing

READ_BYTES = 512 << 20  # larger than any last-level cache
ROUNDS = 1 << 20
UNROLL = 4  # vectors of a step of a read
CHAINS = 12  # independent accumulators of a thread, to hide a multiply-add's latency
TURN_BYTES = 16 << 10  # that a thread reads at once where threads take turns

Kernel = Callable[..., object]
Shape = tuple[int, int, int, int, int]
"""Turns, threads, streams, steps and floats of a step."""


@dataclass(frozen=True)
class Reader:
    """A way to read a buffer."""

    streams: int = 1  # that a thread reads at the same time
    ahead: int = 0  # steps from what is read to what is fetched for later, past the outer caches; 0: the CPU guesses
    turns: bool = False  # whether threads take turns along the buffer, or each has a part of its own

    def shape(self, floats: int, threads: int, width: int) -> Shape:
        """How it sees a buffer of so many floats, all but a rest."""
        steps = floats // (threads * self.streams * width)
        at_once = min(steps, TURN_BYTES // (4 * width)) if self.turns else steps
        return steps // at_once, threads, self.streams, at_once, width


READERS = (Reader(), Reader(4), Reader(8), Reader(ahead=16), Reader(4, ahead=8), Reader(turns=True))


def cpu_probe(target: tvm.target.Target, threads: int) -> Probe:
    """Ways to read and copy `READ_BYTES`, which is what it holds, and to multiply float32 and bytes."""
    environment.set_threads(threads)
    lanes = int(codegen.llvm_get_vector_width(target)) // 32
    with quick_parsing():
        memory, products = _memory_ways(target, threads, UNROLL * lanes), _product_ways(target, threads, lanes)
    return Probe([*memory, *products], READ_BYTES)


def _memory_ways(target: tvm.target.Target, threads: int, width: int) -> list[Way]:
    """Threads write first what they read later, which lays pages near them."""
    data = tvm.runtime.empty((READ_BYTES // 4,), "float32")
    part = Reader().shape(READ_BYTES // 4, threads, width)
    _compile(_fill_kernel(part), target)(data._create_view(part))
    halves = (2, *Reader().shape(READ_BYTES // 8, threads, width)[1:])
    copy = functools.partial(_compile(_copy_kernel(halves), target), data._create_view(halves))
    ways = [Way(COPY, 4.0 * math.prod(halves), repeated(copy))]
    for reader in READERS:
        shape = reader.shape(READ_BYTES // 4, threads, width)
        call = _reading(_compile(_read_kernel(shape, reader.ahead), target), data._create_view(shape), threads, width)
        ways.append(Way(READ, 4.0 * math.prod(shape), repeated(call)))
    return ways


def _reading(read: Kernel, data: tvm.runtime.Tensor, threads: int, width: int) -> Callable[[], object]:
    """A call that reads ones; RuntimeError where it does not find as many as there are."""
    sums = _tensor(np.zeros((threads, width), np.float32))
    read(data, sums)
    found, held = int(sums.numpy().sum(dtype=np.float64)), math.prod(data.shape)
    if found != held:
        raise RuntimeError(f"the probe read {found} of {held} numbers")
    return functools.partial(read, data, sums)


def _product_ways(target: tvm.target.Target, threads: int, lanes: int) -> list[Way]:
    chains = (threads, CHAINS, lanes)
    floats, flops = _tensor(np.ones(chains, np.float32)), _compile(_flops_kernel(threads, lanes), target)
    ways = [Way(FLOPS, 2.0 * ROUNDS * math.prod(chains), repeated(lambda: flops(floats)))]
    instruction = int8_dot.instruction(target, 8)
    if instruction:
        lines = (threads, CHAINS, int8_dot.LANES)
        integers, products = _tensor(np.zeros(lines, np.int32)), _compile(_dot_kernel(threads, instruction), target)
        amount = 2.0 * ROUNDS * int8_dot.PER_BYTES * math.prod(lines)
        ways.append(Way(INT8, amount, repeated(lambda: products(integers))))
    return ways


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array)


def _compile(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Kernel:
    kernel: Kernel = tvm.compile(tvm.IRModule({"main": func}), target=target)["main"]
    return kernel


def _fill_kernel(shape: Shape) -> tvm.tirx.PrimFunc:
    _, threads, _, steps, width = shape

    @T.prim_func(s_tir=True)
    def fill(data: T.Buffer(shape, "float32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("fill"):
                thread = T.axis.spatial(threads, t)
                T.reads()
                T.writes(data[0, thread, 0, 0:steps, 0:width])
                for step in range(steps):
                    for i in T.vectorized(width):
                        data[0, thread, 0, step, i] = T.float32(1)

    return fill


def _copy_kernel(shape: Shape) -> tvm.tirx.PrimFunc:
    _, threads, _, steps, width = shape

    @T.prim_func(s_tir=True)
    def copy(halves: T.Buffer(shape, "float32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("copy"):
                thread = T.axis.spatial(threads, t)
                T.reads(halves[0, thread, 0, 0:steps, 0:width])
                T.writes(halves[1, thread, 0, 0:steps, 0:width])
                for step in range(steps):
                    for i in T.vectorized(width):
                        halves[1, thread, 0, step, i] = halves[0, thread, 0, step, i]

    return copy


def _read_kernel(shape: Shape, ahead: int) -> tvm.tirx.PrimFunc:
    turns, threads, streams, steps, width = shape
    lines = range(0, width, 16) if ahead else range(0)  # of 64 bytes

    @T.prim_func(s_tir=True)
    def read(data: T.Buffer(shape, "float32"), sums: T.Buffer((threads, width), "float32")):
        T.func_attr({"tirx.noalias": True})
        for t in T.parallel(threads):
            with T.sblock("read"):
                thread = T.axis.spatial(threads, t)
                T.reads(data[0:turns, thread, 0:streams, 0:steps, 0:width])
                T.writes(sums[thread, 0:width])
                total = T.sblock_alloc_buffer((width,), "float32")
                for i in T.vectorized(width):
                    total[i] = T.float32(0)
                for turn in range(turns):
                    for step in range(steps):
                        for stream in T.unroll(streams):
                            for line in T.unroll(len(lines)):
                                T.evaluate(
                                    T.call_llvm_intrin(
                                        "void",
                                        "llvm.prefetch.p0",
                                        T.address_of(data[turn, thread, stream, step + ahead, line * 16]),
                                        T.int32(0),
                                        T.int32(0),
                                        T.int32(1),
                                    )
                                )
                            for i in T.vectorized(width):
                                total[i] = total[i] + data[turn, thread, stream, step, i]
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
