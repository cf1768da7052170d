"""Clocks, heat, throttling and energy, of machines that are made up: what is told is right, what is unknown is None."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_environment import lay_out

from tunebench import environment
from tunebench.runtime.conditions import Conditions, Watch, counter_step_s
from tunebench.runtime.cpu import CpuConditions, temperature_c
from tunebench.runtime.nvml import NvidiaConditions, words
from tunebench.timing import Protocol, interleave

RAPL = "sys/class/powercap/intel-rapl"
PACKAGE = {f"{RAPL}:0/name": "package-0", f"{RAPL}:0/max_energy_range_uj": "262143328850", f"{RAPL}:0/energy_uj": "0"}


def set_energy(root: Path, number: int, microjoules: int) -> None:
    (root / f"{RAPL}:{number}/energy_uj").write_text(f"{microjoules}\n")


def test_energy_of_a_counter_that_begins_anew(tmp_path: Path) -> None:
    cpu = CpuConditions(lay_out(tmp_path, PACKAGE))
    set_energy(tmp_path, 0, 262_143_000_000)
    assert cpu.energy_j() == 0
    set_energy(tmp_path, 0, 671_150)
    assert cpu.energy_j() == pytest.approx(1.0)
    set_energy(tmp_path, 0, 2_671_150)
    assert cpu.energy_j() == pytest.approx(3.0)


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path) -> None:
    parts = {f"{RAPL}:0:0/name": "core", f"{RAPL}:2/name": "psys", f"{RAPL}-mmio:0/name": "package-0"}
    other = {f"{RAPL}:1/name": "package-1", f"{RAPL}:1/max_energy_range_uj": "1000", f"{RAPL}:1/energy_uj": "0"}
    cpu = CpuConditions(lay_out(tmp_path, PACKAGE | parts | other))
    assert cpu.energy_j() == 0
    set_energy(tmp_path, 0, 2_000_000)
    set_energy(tmp_path, 1, 900)
    assert cpu.energy_j() == pytest.approx(2.0009)


@pytest.mark.parametrize("missing", ["energy_uj", "all of it"])
def test_energy_that_may_not_be_read_is_unknown(missing: str, tmp_path: Path) -> None:
    files = {name: text for name, text in PACKAGE.items() if missing not in (name.rpartition("/")[2], "all of it")}
    assert CpuConditions(lay_out(tmp_path, files)).energy_j() is None


def test_the_state_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = {f"sys/devices/system/cpu/cpu{i}/thermal_throttle/{kind}_throttle_count": f"{i + 2}"
           for i in range(2) for kind in ("core", "package")}  # fmt: skip
    more = {
        "proc/pressure/cpu": "some avg10=12.50 avg60=0.66 avg300=2.97 total=3262721377\nfull avg10=0.00 total=0",
        "proc/self/cgroup": "0::/box",
        "sys/fs/cgroup/box/cpu.stat": "nr_throttled 7",
    }
    cpu = CpuConditions(lay_out(tmp_path, hot | more))
    sensor = types.SimpleNamespace
    sensors = {"nvme": [sensor(current=99.0)], "k10temp": [sensor(current=61.5), sensor(current=70.25)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    monkeypatch.setattr(psutil, "cpu_times", lambda: types.SimpleNamespace(steal=4.5))
    monkeypatch.setattr(environment, "cpu_frequency_hz", lambda: 3_100_000_000)
    assert cpu.state() == {
        "clock_hz": 3_100_000_000,
        "temperature_c": 70.25,
        "throttle_count": 10,
        "quota_throttle_count": 7,
        "cpu_pressure_share": 0.125,
        "steal_s": 4.5,
    }
    assert cpu.throttle_count() == 17


def test_a_cpu_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    monkeypatch.setattr(psutil, "cpu_times", lambda: types.SimpleNamespace())
    assert temperature_c() is None
    found = CpuConditions(tmp_path).state()
    del found["clock_hz"]
    assert set(found.values()) == {None}
    assert CpuConditions(tmp_path).throttle_count() == 0


class Nvml(types.ModuleType):
    """An H100 of the second slot."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.reasons, self.held_ns, self.millijoules, self.unknown = 0, 0, 0, set[str]()

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByPciBusId": lambda bus: {b"0000:19:00.0": "second"}[bus],
            "nvmlDeviceGetHandleByIndex": lambda index: "first",
            "nvmlDeviceGetClockInfo": lambda handle, which: {1: 1980, 2: 2619}[which],
            "nvmlDeviceGetTemperature": lambda handle, sensor: {("second", 0): 64}[handle, sensor],
            "nvmlDeviceGetPowerUsage": lambda handle: 412_500,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: self.reasons,
            "nvmlDeviceGetViolationStatus": lambda handle, what: types.SimpleNamespace(
                violationTime={1: self.held_ns}[what]
            ),
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: self.millijoules,
        }
        if name in self.__dict__.get("unknown", ()) or name not in answers:
            raise AttributeError(name)
        return answers[name]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    made = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def test_the_state_of_a_gpu(nvml: Nvml) -> None:
    gpu = NvidiaConditions("0000:19:00.0")
    nvml.reasons, nvml.millijoules = 0x4 | 0x20, 1_500
    assert gpu.state() == {
        "sm_clock_hz": 1_980_000_000,
        "memory_clock_hz": 2_619_000_000,
        "temperature_c": 64,
        "power_w": 412.5,
        "throttle_reasons": ["power cap", "heat (software)"],
    }
    assert gpu.energy_j() == 1.5


def test_a_gpu_that_tells_less(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.unknown = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetViolationStatus"}
    gpu = NvidiaConditions("0000:19:00.0")
    assert gpu.energy_j() is None
    assert gpu.state()["power_w"] is None
    assert gpu.throttle_count() == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    without = NvidiaConditions()
    assert set(without.state().values()) == {None}
    assert without.energy_j() is None
    assert without.throttle_count() == 0


@pytest.mark.parametrize(
    ("reasons", "slowed", "named"),
    [
        (0x0, False, []),
        (0x1, False, ["idle"]),
        (0x2 | 0x10 | 0x100, False, ["clocks set by applications", "sync boost", "clocks set for a display"]),
        (0x4, False, ["power cap"]),
        (0x8, True, ["hardware slowdown"]),
        (0x20, True, ["heat (software)"]),
        (0x40 | 0x8, True, ["hardware slowdown", "heat (hardware)"]),
        (0x80, True, ["power brake"]),
    ],
)
def test_what_counts_as_throttled(nvml: Nvml, reasons: int, slowed: bool, named: list[str]) -> None:
    gpu = NvidiaConditions()
    before = gpu.throttle_count()
    nvml.reasons = reasons
    assert (gpu.throttle_count() != before) == slowed
    assert words(reasons) == named
    nvml.reasons, before = 0, gpu.throttle_count()
    nvml.held_ns = 5_000_000  # it was hot within the sample, and is not any more
    assert gpu.throttle_count() > before


class Made(Conditions):
    """A device of 100 W, whose counter has so many steps a second; it is hot in some of its samples."""

    def __init__(self, steps_per_s: int, hot: tuple[int, ...] = ()) -> None:
        self.now_s, self._steps_per_s, self._hot, self._sample, self._throttles = 0.0, steps_per_s, hot, -1, 0

    def run(self, seconds: float) -> None:
        self._sample += 1
        self._throttles += self._sample in self._hot
        self.now_s += seconds

    def state(self) -> dict[str, Any]:
        return {"at_s": self.now_s}

    def throttle_count(self) -> int:
        return self._throttles

    def energy_j(self) -> float | None:
        return 100.0 * (self.now_s * self._steps_per_s // 1) / self._steps_per_s if self._steps_per_s else None


def watched(device: Made, sample_s: float, count: int) -> dict[str, Any]:
    """An arm on a device, watched, beside one that is on none; tokens: ten a sample."""
    clock = lambda: round(device.now_s * 1e9)  # noqa: E731
    arms = {"gpu": lambda: device.run(sample_s), "probe": lambda: None}
    with Watch({"gpu": device}) as watch:
        protocol = Protocol(warmups=0, samples=count, budget_s=1e9)
        taken = interleave(arms, protocol, clock, around=watch.around)
    assert watch.found("probe", taken["probe"].samples_ns, 10) == {}
    return watch.found("gpu", taken["gpu"].samples_ns, 10)


def fixed_step(device: Made, step_s: float | None) -> Made:
    device.__dict__["step_s"] = step_s
    return device


def test_a_sample_taken_while_hot_is_marked_and_no_other() -> None:
    found = watched(Made(0, hot=(1, 4)), 0.5, 6)
    assert found["throttled"] == [1, 4]
    assert found["conditions"] == {"start": {"at_s": 0.0}, "end": {"at_s": 3.0}}
    assert found["joules_per_token"] is None


@pytest.mark.parametrize(
    ("steps_per_s", "sample_s", "count", "expected"),
    [
        (1000, 0.5, 4, 100 * 0.5 / 10),
        (20, 0.5, 8, 100 * 0.5 / 10),
        (1000, 0.2, 4, None),  # 0.8 s are too short
        (20, 0.2, 20, None),  # a sample is four steps of the counter
        (0, 0.5, 8, None),
    ],
)
def test_energy_is_told_where_the_counter_is_fine_enough(
    steps_per_s: int, sample_s: float, count: int, expected: float | None
) -> None:
    device = fixed_step(Made(steps_per_s), 1 / steps_per_s if steps_per_s else None)
    assert watched(device, sample_s, count)["joules_per_token"] == (expected and pytest.approx(expected, rel=0.05))


@pytest.mark.parametrize(("steps_per_s", "sample_s"), [(20, 0.02), (1000, 0.001), (10, 0.2)])
def test_short_samples_are_repeated_for_their_energy(steps_per_s: int, sample_s: float) -> None:
    device = fixed_step(Made(steps_per_s), 1 / steps_per_s)
    watch = Watch({"gpu": device}, clock=lambda: device.now_s)
    samples_ns = [round(sample_s * 1e9)] * 4
    watch.repeat("gpu", lambda: device.run(sample_s), samples_ns)
    assert device.now_s >= max(1.5, 20 / steps_per_s)
    assert watch.found("gpu", samples_ns, 10)["joules_per_token"] == pytest.approx(100 * sample_s / 10, rel=0.1)


def test_nothing_is_repeated_without_a_counter() -> None:
    device = fixed_step(Made(0), None)
    watch = Watch({"gpu": device}, clock=lambda: device.now_s)
    watch.repeat("gpu", lambda: device.run(1.0), [1000])
    watch.repeat("other", lambda: device.run(1.0), [1000])
    assert device.now_s == 0


def test_a_device_without_any_state_has_no_conditions() -> None:
    with Watch({"arm": Conditions()}) as watch, watch.around("arm"):
        pass
    assert watch.found("arm", [2_000_000_000], 1) == {"conditions": {}, "throttled": [], "joules_per_token": None}


def test_how_fine_a_counter_is() -> None:
    ticks = itertools.count()
    clock = lambda: next(ticks) / 1000  # noqa: E731  (a millisecond a look)
    start = itertools.count()
    assert counter_step_s(lambda: float(next(start) // 20), clock) == pytest.approx(0.020, abs=0.002)
    assert counter_step_s(lambda: 5.0, clock) is None
    assert counter_step_s(lambda: None, clock) is None
