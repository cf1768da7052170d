"""What a device of a GPU API can do at most: the rates of kernels that read, and copy within, its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tunebench.devices.probe import COPY, READ, Probe, Way
from tunebench.kernels import shader_dialect
from tunebench.kernels.shader_dialect import Language, Param
from tunebench.runtime.apis import ApiDevice, Buffer, Call
from tunebench.runtime.plan import Shader

BUFFER_BYTES = 64 << 20  # every API takes buffers of this size
BUFFERS = 7  # read by one launch, so that the waits between launches count little; WebGPU binds eight at least
THREADS = 256
EACH = (1, 2, 4, 8)  # vectors that a thread reads of every buffer: ways to read
SAMPLE_S = 0.02
FACTOR = 2654435761  # between one word of a buffer and the next
COPY_BODY = f"  let i : u32 = bid * {THREADS}u + tid;\n  y[i] = x[i];"


def api_probe(device: ApiDevice) -> Probe:
    """Ways to read, and one to copy, by wall-clock; `BUFFERS` buffers and little more.

    A kernel copies, as APIs may hand their own copies to a unit that is slower than the memory.
    """
    language = Language(shader_dialect.LANGUAGES[str(device.target()["kind"])])
    words = np.arange(BUFFER_BYTES // 4, dtype=np.uint32) * np.uint32(FACTOR)
    buffers = [device.allocate(BUFFER_BYTES) for _ in range(BUFFERS)]
    for buffer in buffers:
        device.write(buffer, words)
    expected = BUFFERS * int(words.sum(dtype=np.uint64)) % 2**32
    sums = device.allocate(BUFFER_BYTES // 16 * 4)
    reads = [_read_way(device, language, buffers, sums, each, expected) for each in EACH]
    return Probe([*reads, _copy_way(device, language, buffers)], BUFFERS * BUFFER_BYTES, SAMPLE_S)


def reader(language: Language, each: int) -> Shader:
    """A kernel that adds up `each` vectors of every buffer a thread, and writes down their words' sum, which wraps."""
    names = [f"x{i}" for i in range(BUFFERS)]
    loads = [f"{name}[at + {step * THREADS}u]" for step in range(each) for name in names]
    body = [f"  let at : u32 = bid * {each * THREADS}u + tid;", f"  let v : vec4u = {' + '.join(loads)};"]
    body.append(f"  sums[bid * {THREADS}u + tid] = v.x + v.y + v.z + v.w;")
    params = [*(Param(name, "vec4u") for name in names), Param("sums", "u32", True)]
    return shader_dialect.shader(language, params, THREADS, "\n".join(body))


def _read_way(
    device: ApiDevice, language: Language, buffers: Sequence[Buffer], sums: Buffer, each: int, expected: int
) -> Way:
    """RuntimeError where it does not find the sum of what is there."""
    threads = BUFFER_BYTES // 16 // each
    call = Call(device.compile(reader(language, each)), (*buffers, sums), (threads // THREADS, 1, 1))
    device.record([call]).run()
    if int(device.read(sums, 4 * threads).view(np.uint32).sum(dtype=np.uint64)) % 2**32 != expected:
        raise RuntimeError("a reader of the probe found another sum than what is there")
    return Way(READ, float(len(buffers) * BUFFER_BYTES), lambda times: _recorded(device, [call], times))


def _copy_way(device: ApiDevice, language: Language, buffers: Sequence[Buffer]) -> Way:
    params = (Param("x", "vec4u"), Param("y", "vec4u", True))
    kernel = device.compile(shader_dialect.shader(language, params, THREADS, COPY_BODY))
    blocks = (BUFFER_BYTES // (16 * THREADS), 1, 1)
    calls = [Call(kernel, pair, blocks) for pair in zip(buffers, [*buffers[1:], buffers[0]], strict=True)]
    amount = 2.0 * len(buffers) * BUFFER_BYTES  # read and written
    return Way(COPY, amount, lambda times: _recorded(device, calls, times))


def _recorded(device: ApiDevice, calls: Sequence[Call], times: int) -> Callable[[], None]:
    recording = device.record(calls, times)

    def run() -> None:
        recording.run()
        device.wait()

    return run
