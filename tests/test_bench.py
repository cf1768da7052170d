"""The measuring loop on a device made of arrays: input sets, what is compared, what is timed, what is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import tvm
from conftest import cpu_target, input_of
from test_runner import N, kernel

from tunebench.errors import TuneBenchError
from tunebench.runners import worker
from tunebench.runners.base import CHOICE, FINAL, MeasureInput, NotBuilt, Timed, Wrong
from tunebench.runners.bench import (
    LONG_NS,
    Bench,
    Primitives,
    Rotation,
    Rules,
    Sampler,
    count_sets,
    held_bytes,
    random_inputs,
)
from tunebench.runners.gpu import RULES as GPU_RULES
from tunebench.runners.local import LocalPrimitives
from tunebench.runners.rpc.device import RpcPrimitives
from tunebench.runners.shader import ShaderPrimitives
from tunebench.timing import Protocol

SET_BYTES = 2 * N * 4
ROUNDS = Protocol(warmups=1, samples=4)
Function = Callable[[np.ndarray], np.ndarray]


class Arrays(Primitives):
    """A device whose kernels are functions of an array, with a clock that goes on by 10 ns a call."""

    kernels: dict[str, Function] = {  # noqa: RUF012
        "good": lambda a: 2 * a,
        "wrong": lambda a: 2.01 * a,
        "half done": lambda a: 2 * a[: N // 2],
        "slow": lambda a: 2 * a,
    }

    def __init__(self, rules: Rules = Rules()) -> None:  # noqa: B008
        self.rules = rules
        self.used: list[int] = []  # the input of each timed call
        self.counts: list[int] = []  # calls of each sample

    def allocate(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    duplicate = allocate

    def restore(self, to: np.ndarray, source: np.ndarray) -> None:
        to[...] = source

    def read(self, buffer: np.ndarray) -> np.ndarray:
        return buffer.copy()

    def load(self, built: str) -> tuple[str, Function]:
        name = built if built in self.kernels else "good"
        if built == "broken":
            raise RuntimeError("no such instruction")
        return name, self.kernels[name]

    def run(self, kernel: tuple[str, Function], buffers: Sequence[np.ndarray]) -> None:
        found = kernel[1](buffers[0])
        buffers[1][: len(found)] = found

    def sampler(self, kernel: tuple[str, Function], rotation: Rotation) -> Sampler:
        def sample(calls: int) -> int:
            self.counts.append(calls)
            self.used += [id(rotation.next()[0]) for _ in range(calls)]
            return LONG_NS + 1 if kernel[0] == "slow" else 10

        return sample


def given(name: str = "double", sets: int = 1) -> MeasureInput:
    """A kernel whose inputs make so many sets."""
    made = input_of(name, kernel("good"))
    return MeasureInput(made.name, made.reference, made.depth, cold_bytes=sets * SET_BYTES)


def bench(device: Arrays, sets: int = 1) -> Bench:
    return Bench(device, given(sets=sets), "good")


@pytest.mark.parametrize(("name", "right"), [("good", True), ("wrong", False), ("half done", False)])
def test_outputs_are_compared_and_gaps_show(name: str, right: bool) -> None:
    device = Arrays()
    assert (bench(device).check(device.load(name)) == "") == right


def test_no_arm_finds_the_set_of_the_one_before() -> None:
    device = Arrays()
    loaded = {name: device.load("good") for name in ("default", "tuned", "again")}
    found = bench(device, sets=4).time(loaded, ROUNDS)
    assert {len(timed.samples_ns) for timed in found.values()} == {ROUNDS.samples}
    assert len(set(device.used)) == 4
    assert all(first != second for first, second in zip(device.used, device.used[1:], strict=False))


def test_inputs_of_sets_are_apart_and_the_output_is_shared() -> None:
    made = bench(Arrays(), sets=3)
    sets = [made._rotation.next() for _ in range(3)]
    assert len({id(each[0]) for each in sets}) == 3
    assert len({id(each[1]) for each in sets}) == 1


@pytest.mark.parametrize(
    ("rules", "sample_s", "calls"),
    [
        (Rules(), 0.0, 1),
        (Rules(), 1e-6, 100),  # as many as fill it
        (Rules(whole_rounds=True), 0.0, 4),
        (Rules(whole_rounds=True), 1e-6, 100),
        (Rules(), 1e-3, 256),  # at most
    ],
)
def test_calls_of_a_sample(rules: Rules, sample_s: float, calls: int) -> None:
    device = Arrays(rules)
    protocol = Protocol(warmups=1, samples=2, sample_s=sample_s)
    bench(device, sets=4).time({"it": device.load("good")}, protocol)
    warmups = [1, calls] if calls > 1 else [1]
    assert device.counts == [*warmups, calls, calls]


@pytest.mark.parametrize("protocol", [CHOICE, FINAL])
def test_a_decision_is_measured_alike_on_every_device(protocol: Protocol) -> None:
    counts = []
    for rules in (LocalPrimitives.rules, GPU_RULES, RpcPrimitives.rules):
        device = Arrays(replace(rules, set_bytes=1 << 30))
        bench(device, sets=5).time({"it": device.load("good")}, replace(protocol, sample_s=0.0))
        counts.append(device.counts)
    assert counts == [[1, *[5] * (1 + protocol.samples)]] * 3


def test_a_long_call_is_a_sample_of_its_own() -> None:
    device = Arrays(Rules(whole_rounds=True))
    bench(device, sets=4).time({"it": device.load("slow")}, ROUNDS)
    assert set(device.counts) == {1}


def test_what_takes_over_the_limit_is_timed_once() -> None:
    device = Arrays(Rules(launch_ns=5))
    made = bench(device)
    assert made.check_and_time(device.load("good"), ROUNDS, 4) == Timed((10,))
    assert made.check_and_time(device.load("good"), ROUNDS, 5) == Timed((10,) * ROUNDS.samples)
    assert isinstance(made.check_and_time(device.load("wrong"), ROUNDS, 5), Wrong)


def test_sets_are_larger_than_the_caches_within_what_a_device_holds() -> None:
    assert count_sets(given(sets=5), 1 << 30) == 5
    assert count_sets(given(sets=5), 3 * SET_BYTES) == 3
    assert count_sets(given(sets=1000), 1 << 30) == 32
    assert held_bytes(given(sets=5), 3 * SET_BYTES) == 3 * SET_BYTES


@pytest.fixture
def device() -> Iterator[Arrays]:
    """A device in this process, as a worker has it, which keeps three sets."""
    made = Arrays(Rules(kept_bytes=3 * SET_BYTES))
    worker.start_measuring(lambda: made)
    yield made
    worker.stop()


def test_kernels_measured_long_ago_make_room(device: Arrays) -> None:
    first, second = (worker.set_up(given(name)) for name in ("first", "second"))
    assert worker.set_up(given("first")) is first
    worker.set_up(given("large", sets=2))  # which leaves room for one
    assert worker.set_up(given("first")) is first
    assert worker.set_up(given("second")) is not second


def test_a_comparison_says_what_became_of_each(device: Arrays) -> None:
    found = worker.compare(given(), {"same": "good", "off": "wrong", "none": "broken"}, ROUNDS, with_default=True)
    assert {name: type(each) for name, each in found.items()} == {
        "default": Timed,
        "same": Timed,
        "off": Wrong,
        "none": NotBuilt,
    }
    assert set(worker.compare(given(), {"same": "good"}, ROUNDS, with_default=False)) == {"same"}


def test_a_device_that_does_not_open_is_an_error_each_time() -> None:
    process = worker.Process(functools.partial(ShaderPrimitives, "nothing"), tvm.ir.save_json(cpu_target()), "")
    for _ in range(2):
        with pytest.raises(TuneBenchError, match="unknown API 'nothing'"):
            process.ask(60.0, worker.prepare, given(), ROUNDS)
    process.kill()


def test_inputs_are_random_and_indices_in_range() -> None:
    (a, _) = random_inputs(tvm.IRModule({"main": kernel("good")["main"]}), 3, np.random.default_rng(0))
    assert a.shape == (N,)
    assert len(np.unique(a)) > N // 2
