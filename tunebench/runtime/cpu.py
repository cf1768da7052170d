"""A CPU's clock, heat, throttling and energy, as the system tells them; on Linux for the most part."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil

from tunebench import environment, sysfs
from tunebench.runtime.conditions import Conditions

SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
"""What drivers call a CPU's sensors."""


class CpuConditions(Conditions):
    """This machine's CPU, all sockets and whoever else uses it. `root` is the file system's root."""

    def __init__(self, root: Path = sysfs.ROOT) -> None:
        self._root = root
        self._counters = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))  # AMD's are called so, too
        packages = [zone for zone in zones if sysfs.text(zone / "name").startswith("package")]  # the others are parts
        self._packages = [Package(zone) for zone in packages]

    def state(self) -> dict[str, Any]:
        """Counts and `steal_s` are since the machine's start; tasks waited for a core in a share of the last 10 s."""
        return {
            "clock_hz": environment.cpu_frequency_hz(),
            "temperature_c": temperature_c(),
            "throttle_count": self._hot_count(),
            "quota_throttle_count": sysfs.quota_throttle_count(self._root),
            "cpu_pressure_share": self._pressure(),
            "steal_s": getattr(psutil.cpu_times(), "steal", None),
        }

    def throttle_count(self) -> int:
        """Of heat, by core and by package, and of the control group's quota."""
        return (self._hot_count() or 0) + (sysfs.quota_throttle_count(self._root) or 0)

    def energy_j(self) -> float | None:
        """Of all packages, by RAPL; their memory is not in it, and most systems let only root read it."""
        taken = [package.energy_j() for package in self._packages]
        known = [each for each in taken if each is not None]
        return sum(known) if known and len(known) == len(taken) else None

    def _hot_count(self) -> int | None:
        counts = [int(count) for path in self._counters if (count := sysfs.text(path)).isdigit()]
        return sum(counts) if counts else None

    def _pressure(self) -> float | None:
        some = re.search(r"^some avg10=([\d.]+)", sysfs.text(self._root / "proc/pressure/cpu"), re.MULTILINE)
        return float(some[1]) / 100 if some else None


class Package:
    """The energy counter of one socket, in a folder of /sys/class/powercap."""

    def __init__(self, zone: Path) -> None:
        self._counter = zone / "energy_uj"
        self._range_uj = int(sysfs.text(zone / "max_energy_range_uj") or 0)
        self._last_uj: int | None = None
        self._taken_uj = 0

    def energy_j(self) -> float | None:
        """Since the first call; right as long as the counter does not begin anew twice between two calls."""
        read = sysfs.text(self._counter)
        if not read.isdigit():
            return None
        now = int(read)
        step = 0 if self._last_uj is None else now - self._last_uj
        self._taken_uj += step if step >= 0 else step + self._range_uj
        self._last_uj = now
        return self._taken_uj / 1e6


def temperature_c() -> float | None:
    """The CPU's hottest sensor; None where there is none."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # not on macOS and Windows
        return None
    found = [sensor.current for name in SENSORS for sensor in sensors.get(name, []) if sensor.current]
    return max(found, default=None)
