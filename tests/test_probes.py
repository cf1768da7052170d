"""What devices can do at most: the fastest of several ways counts, and every reader finds what is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from conftest import need
from test_cuda import gpu_target, has_gpu
from typer.testing import CliRunner

from tunebench.cli import app
from tunebench.compile import nvrtc
from tunebench.devices import api_probe, cpu_probe, cuda_probe, opening, probe, targets
from tunebench.devices.api_probe import BUFFERS
from tunebench.devices.cpu_probe import READERS, Reader
from tunebench.devices.probe import COPY, FLOPS, INT8, READ, RING, Probe, Way, state_words
from tunebench.errors import TuneBenchError
from tunebench.runtime import apis

HOPPER_BYTES = 227 << 10  # of shared memory for a block


class Clock:
    """A time that passes as it is told, in nanoseconds."""

    def __init__(self) -> None:
        self.now, self.calls = 0, 0

    def __call__(self) -> int:
        return self.now

    def way(self, rate: str, amount: float, once_ns: int) -> Way:
        def prepare(times: int) -> Callable[[], None]:
            return lambda: self.run(times * once_ns)

        return Way(rate, amount, prepare)

    def run(self, spent_ns: int) -> None:
        self.now += spent_ns
        self.calls += 1


def test_the_best_way_counts_and_only_it_is_measured_again() -> None:
    clock = Clock()
    ways = [
        clock.way(COPY, 2000, 1_000),  # 2 GB/ms
        clock.way(READ, 1000, 400),
        clock.way(READ, 1000, 250),  # 4 bytes a nanosecond
        clock.way(READ, 500, 240),
        clock.way(RING, 1000, 300),
        clock.way(FLOPS, 8000, 1_000_000_000),
    ]
    made = Probe(ways, held_bytes=7, sample_s=0.001, clock=clock)
    assert made.held_bytes == 7
    assert set(made.arms) == {READ, FLOPS}
    before = clock.now
    made.arms[READ]()
    assert clock.now - before == pytest.approx(1_000_000, abs=250)  # so many that they fill a sample
    assert made() == pytest.approx({COPY: 2e9, READ: 4e9, RING: 1000 / 300 * 1e9, FLOPS: 8000})
    taken = probe.interleave(made.arms, probe.PROTOCOL, clock)
    assert made.rates(taken) == pytest.approx({READ: 4e9, FLOPS: 8000})


def test_a_device_without_a_probe_has_no_arms() -> None:
    assert Probe().arms == Probe()() == {}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_readers_of_a_cpu_reach_all_but_a_rest(reader: Reader, threads: int) -> None:
    floats, width = 1 << 20, 64
    covered = math.prod(reader.shape(floats, threads, width))
    turn = cpu_probe.TURN_BYTES // 4 if reader.turns else 0
    assert floats - threads * max(turn, reader.streams * width) < covered <= floats


def test_a_reader_of_a_cpu_that_reads_less_is_found_out() -> None:
    ones = tvm.runtime.tensor(np.ones((1, 2, 1, 8, 4), np.float32))

    def read(data: tvm.runtime.Tensor, sums: tvm.runtime.Tensor) -> None:
        sums.copyfrom(np.full((2, 4), 7, np.float32))

    with pytest.raises(RuntimeError, match="read 56 of 64 numbers"):
        cpu_probe._reading(read, ones, 2, 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers and short samples."""
    monkeypatch.setattr(cpu_probe, "READ_BYTES", 8 << 20)
    monkeypatch.setattr(probe, "SAMPLE_S", 0.001)
    monkeypatch.setattr(probe, "CHOICE_S", 0.001)
    monkeypatch.setattr(api_probe, "BUFFER_BYTES", 4 << 20)
    monkeypatch.setattr(api_probe, "SAMPLE_S", 0.001)


@pytest.mark.usefixtures("quick")
def test_the_rates_of_this_cpu_are_plausible() -> None:
    device = opening.open_device(targets.find("llvm"), 1)
    made = device.probe()
    assert made.held_bytes == 8 << 20
    assert len({READ, COPY} & set(made.arms)) == 1
    rates = made()
    assert {COPY, READ, FLOPS} <= set(rates) <= {COPY, READ, FLOPS, INT8}
    assert all(1e8 < rate < 1e14 for rate in rates.values())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["webgpu", "opencl"])
def test_readers_of_gpu_apis(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = need(apis.open_device, name)
    made = api_probe.api_probe(device)  # which checks what each of them finds
    assert made.held_bytes == BUFFERS * 4 << 20
    rates = made()
    assert set(rates) == {READ, COPY}
    assert all(1e7 < rate < 1e14 for rate in rates.values())
    whole = api_probe.reader
    monkeypatch.setattr(api_probe, "reader", lambda language, each: whole(language, max(1, each // 2)))
    with pytest.raises(RuntimeError, match="another sum"):
        api_probe.api_probe(device)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_readers_for_cuda_compile(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    chosen = cuda_probe.readers(arch, HOPPER_BYTES)
    assert {reader.rate for reader in chosen} == ({READ, RING} if arch >= 90 else {READ})
    compiled: list[str] = []
    monkeypatch.setattr(nvrtc, "_cached", lambda folder, code: compiled.append(code) or nvrtc.compile_cuda(code))
    kernels = [cuda_probe.fill_kernel(1 << 30, 132)]
    kernels += [cuda_probe.read_kernel(reader, cuda_probe.READ_BYTES, 132 * reader.blocks) for reader in chosen]
    with nvrtc.compiling(None):  # type: ignore[arg-type]  (nothing is kept)
        for kernel in kernels:
            nvrtc.build(tvm.IRModule({"main": kernel}), gpu_target(f"sm_{arch}"))
    assert len(compiled) == len(kernels)
    for reader, code in zip(chosen, compiled[1:], strict=True):
        assert reader.call.format(cuda_probe.READ_BYTES // 16) in code


def test_a_ring_is_tried_where_it_fits() -> None:
    rings = [{ring.shared_bytes >> 10 for ring in cuda_probe.readers(*gpu) if ring.rate == RING}
             for gpu in ((90, HOPPER_BYTES), (120, 99 << 10), (120, 64 << 10))]  # fmt: skip
    assert rings == [{97, 193}, {97}, set()]


def test_the_sum_that_readers_for_cuda_must_find() -> None:
    words = np.arange(1 << 12, dtype=np.uint32) * np.uint32(cuda_probe.FACTOR)
    assert cuda_probe.words_sum(words.nbytes) == int(words.sum(dtype=np.uint64)) % 2**32


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="there is no GPU here")
def test_the_rates_of_this_gpu() -> None:
    rates = opening.open_device(targets.find("cuda")).probe()()  # which checks every reader's sum
    assert max(rates[READ], rates.get(RING, 0)) > 0.8 * rates[COPY]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("target", "rates"), [("llvm", ["reading", "copying", "multiply-adds"]), ("webgpu", ["reading"])]
)
def test_devices_shows_what_a_target_does(target: str, rates: list[str]) -> None:
    if target == "webgpu":
        need(apis.open_device, target)
    shown = CliRunner().invoke(app.app, ["devices", "--probe", "--target", target])
    assert shown.exit_code == 0, shown.output
    assert all(rate in shown.output for rate in rates)
    assert ("throttle count" in shown.output) == (target == "llvm")


def test_a_device_that_is_not_here_is_one_line() -> None:
    with pytest.raises(TuneBenchError, match=r"^hexagon: .*no device"):
        app.inputs.probed("hexagon", 0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sm_clock_hz", 1_980_000_000, ("sm clock", "1,980 MHz")),
        ("temperature_c", 61.4, ("temperature", "61 °C")),
        ("power_w", None, ("power", "unknown")),
        ("throttle_reasons", ["power cap", "idle"], ("throttle reasons", "power cap, idle")),
        ("throttle_reasons", [], ("throttle reasons", "none")),
        ("cpu_pressure_share", 0.125, ("cpu pressure", "12 %")),
        ("steal_s", 4.6, ("steal", "5 s")),
        ("throttle_count", 12, ("throttle count", "12")),
    ],
)
def test_a_state_in_words(name: str, value: object, words: tuple[str, str]) -> None:
    assert state_words(name, value) == words
