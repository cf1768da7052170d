"""The clocks, heat, throttling and energy of an NVIDIA GPU, by NVML; nothing of it where NVML is missing."""

from __future__ import annotations

from typing import Any

from tunebench.runtime.conditions import Conditions

REASONS = {
    0x1: "idle",
    0x2: "clocks set by applications",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "clocks set for a display",
}
"""NVML's bits of why clocks are not higher."""
THROTTLES = 0x8 | 0x20 | 0x40 | 0x80
"""Those by which a sample counts as throttled. The power cap is none: matrix products run at it all the time, on any
machine with that GPU, while heat and a lack of power are of this machine and this moment."""
SM, MEMORY = 1, 2  # NVML's numbers of clocks
CELSIUS, HEAT = 0, 1  # of its sensor, and of what it counts the time of


class NvidiaConditions(Conditions):
    """One GPU: that of a PCI bus id, or the first."""

    def __init__(self, bus_id: str = "") -> None:
        self._reasons_seen = 0
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            by_bus, by_index = pynvml.nvmlDeviceGetHandleByPciBusId, pynvml.nvmlDeviceGetHandleByIndex
            self._handle: Any = by_bus(bus_id.encode()) if bus_id else by_index(0)
        except Exception:  # whatever NVML misses here
            self._handle = None

    def state(self) -> dict[str, Any]:
        """With the reasons why clocks are not higher, in words."""
        sm_mhz, memory_mhz, milliwatts = self._clock(SM), self._clock(MEMORY), self._ask("nvmlDeviceGetPowerUsage")
        reasons = self._reasons()
        return {
            "sm_clock_hz": None if sm_mhz is None else sm_mhz * 1_000_000,
            "memory_clock_hz": None if memory_mhz is None else memory_mhz * 1_000_000,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", CELSIUS),
            "power_w": None if milliwatts is None else milliwatts / 1e3,
            "throttle_reasons": None if reasons is None else words(reasons),
        }

    def throttle_count(self) -> int:
        """Nanoseconds that heat held clocks down, and how often a call found a reason of `THROTTLES`."""
        self._reasons_seen += bool((self._reasons() or 0) & THROTTLES)
        held = self._ask("nvmlDeviceGetViolationStatus", HEAT)
        return self._reasons_seen + (int(held.violationTime) if held else 0)

    def energy_j(self) -> float | None:
        """Since the driver was loaded; the whole board's."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def _clock(self, which: int) -> int | None:
        found: int | None = self._ask("nvmlDeviceGetClockInfo", which)
        return found

    def _reasons(self) -> int | None:
        found: int | None = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")  # its name in every version
        return found

    def _ask(self, function: str, *args: int) -> Any:
        """What a function of NVML says of the GPU; None where it does not know."""
        if self._handle is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *args)
        except Exception:  # not of this GPU, not with these rights
            return None


def words(reasons: int) -> list[str]:
    """NVML's bits in words."""
    return [name for bit, name in REASONS.items() if reasons & bit]
