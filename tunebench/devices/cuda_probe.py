"""What this machine's GPU can do at most: reads and copies of its memory, and a matrix product of cuBLAS."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tunebench.compile import nvrtc
from tunebench.devices.probe import COPY, HALVES, READ, RING, Probe, Way, repeated
from tunebench.kernels import templates
from tunebench.kernels.templates import Param
from tunebench.runtime import cublas
from tunebench.runtime import cuda as cuda_runtime

READ_BYTES = 2 << 30  # much larger than any L2, and long enough that a launch's start and end do not count
SIDE = 8192  # of the matrices
SAMPLE_S = 0.02
FACTOR = 2654435761  # of `fill_words`


@dataclass(frozen=True)
class Reader:
    """Plain loads of 16 bytes: a multiprocessor has so many blocks of threads, a thread so many loads on their way."""

    blocks: int
    threads: int
    at_once: int
    rate = READ
    shared_bytes = 0

    @property
    def call(self) -> str:
        """The device function, but for the number of vectors."""
        return f"tb::read_words<{{}}, {self.at_once}, {self.threads}>"


@dataclass(frozen=True)
class Ring:
    """Bulk copies to shared memory: a multiprocessor has so many blocks with stages of so many bytes."""

    blocks: int
    stages: int
    stage_bytes: int
    rate = RING
    threads = 32 + 256

    @property
    def shared_bytes(self) -> int:
        """Of a block, with what aligning takes."""
        return 1024 + self.stages * self.stage_bytes

    @property
    def call(self) -> str:
        """The device function, but for the number of vectors."""
        return f"tb::read_ring<{{}}, {self.stages}, {self.stage_bytes}, {self.threads}>"


BARRIER_BYTES = 1024  # more than a ring's barriers take of the shared memory
PLAIN = (Reader(8, 256, 4), Reader(4, 512, 8), Reader(2, 1024, 4), Reader(64, 256, 8))
RINGS = (Ring(1, 6, 32 << 10), Ring(1, 12, 16 << 10), Ring(2, 6, 16 << 10))


def cuda_probe(target: tvm.target.Target) -> Probe:
    """Ways to read and copy `READ_BYTES`, and a product in float16; 2.4 GiB of buffers."""
    stream = cuda_runtime.Stream()
    memory = _memory_ways(stream, target)
    products, product_bytes = _product_ways(stream)
    return Probe([*memory, *products], READ_BYTES + product_bytes, SAMPLE_S)


def readers(arch: int, shared_bytes: int) -> tuple[Reader | Ring, ...]:
    """What a GPU of a compute capability, times ten, and so much shared memory for a block can run."""
    rings = [ring for ring in RINGS if ring.shared_bytes + BARRIER_BYTES <= shared_bytes]
    return (*PLAIN, *rings) if arch >= templates.HOPPER else PLAIN


def read_kernel(reader: Reader | Ring, size_bytes: int, blocks: int) -> tvm.tirx.PrimFunc:
    """A kernel of so many blocks that takes the buffer and one uint32 for each of its threads."""
    params = [Param("data", (size_bytes // 4,), "uint32"), Param("sums", (blocks * reader.threads,), "uint32")]
    call = reader.call.format(size_bytes // 16)
    return templates.extern_kernel(
        params, (blocks,), reader.threads, call, ["data", "sums"], shared_bytes=reader.shared_bytes
    )


def fill_kernel(size_bytes: int, blocks: int, threads: int = 256) -> tvm.tirx.PrimFunc:
    """A kernel that writes the words whose sum is `words_sum`."""
    params = [Param("data", (size_bytes // 4,), "uint32")]
    call = f"tb::fill_words<{size_bytes // 16}, {threads}>"
    return templates.extern_kernel(params, (blocks,), threads, call, ["data"])


def words_sum(size_bytes: int) -> int:
    """The sum of the words that `fill_words` writes, modulo 2^32."""
    count = size_bytes // 4
    return FACTOR * (count * (count - 1) // 2) % 2**32


def _memory_ways(stream: cuda_runtime.Stream, target: tvm.target.Target) -> list[Way]:
    """Halves are copied once the readers have been checked."""
    processors = int(cuda_runtime.DEVICE.multi_processor_count)
    data = tvm.runtime.empty((READ_BYTES // 4,), "uint32", cuda_runtime.DEVICE)
    chosen = readers(templates.gpu_of(target).arch, cuda_runtime.shared_bytes())
    kernels = [fill_kernel(READ_BYTES, 8 * processors)]
    kernels += [read_kernel(each, READ_BYTES, each.blocks * processors) for each in chosen]
    fill, *reads = _compile(kernels, target)
    stream.run(lambda: fill(data))
    ways = []
    for reader, read in zip(chosen, reads, strict=True):
        call = _reading(stream, read, data, reader.blocks * processors * reader.threads)
        ways.append(Way(reader.rate, float(READ_BYTES), functools.partial(_on_stream, stream, call)))
    half = READ_BYTES // 2
    copy = functools.partial(stream.copy, data, data, half, half)
    return [*ways, Way(COPY, 2.0 * half, functools.partial(_on_stream, stream, copy))]


def _reading(stream: cuda_runtime.Stream, read: Any, data: tvm.runtime.Tensor, threads: int) -> Callable[[], object]:
    """A launch; RuntimeError where it does not find the sum of what is there."""
    sums = tvm.runtime.empty((threads,), "uint32", cuda_runtime.DEVICE)
    stream.run(lambda: read(data, sums))
    if int(sums.numpy().sum(dtype=np.uint64)) % 2**32 != words_sum(READ_BYTES):
        raise RuntimeError("a reader of the probe found another sum than what is there")
    return functools.partial(read, data, sums)


def _product_ways(stream: cuda_runtime.Stream) -> tuple[list[Way], int]:
    """cuBLAS's, where it is there, and the bytes of its matrices."""
    if not cublas.available():
        return [], 0
    noise = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32).astype(np.float16)
    a, b = (tvm.runtime.tensor(noise, cuda_runtime.DEVICE) for _ in range(2))
    held = (a, b, tvm.runtime.empty((SIDE, SIDE), "float16", cuda_runtime.DEVICE))
    x, w, y = (ctypes.c_void_p(cuda_runtime.address(tensor)) for tensor in held)

    def multiply(_: object = held) -> None:  # which live as long as this does
        cublas.product(x, w, x, y, SIDE, SIDE, SIDE, SIDE, 0, 1, 0)

    return [Way(HALVES, 2.0 * SIDE**3, functools.partial(_on_stream, stream, multiply))], len(held) * noise.nbytes


def _on_stream(stream: cuda_runtime.Stream, call: Callable[[], object], times: int) -> Callable[[], None]:
    many = repeated(call)(times)
    return lambda: stream.run(many)


def _compile(kernels: list[tvm.tirx.PrimFunc], target: tvm.target.Target) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, nvrtc.compiling(Path(folder)):
        return [tvm.compile(tvm.IRModule({"main": kernel}), target=target)["main"] for kernel in kernels]
