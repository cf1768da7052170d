"""From a target to the device that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tunebench import registry
from tunebench.devices.absent import AbsentDevice
from tunebench.devices.api import ShaderDevice
from tunebench.devices.base import Device
from tunebench.devices.browser import BrowserDevice
from tunebench.devices.cpu import CpuDevice
from tunebench.devices.cuda import CudaDevice
from tunebench.devices.metal import MetalDevice
from tunebench.devices.rpc import RpcDevice
from tunebench.devices.targets import find
from tunebench.errors import TuneBenchError, remembered
from tunebench.spec import EngineName, TargetPreset

RUNNERS = ("local", "cuda", "webgpu", "dawn", "opencl", "rpc")


@remembered
def open_device(preset: TargetPreset, threads: int = 0, engine: EngineName | None = None) -> Device:
    """The device of a preset; TuneBenchError where a package, a driver or a device is missing."""
    if engine == EngineName.BROWSER:
        return BrowserDevice(preset)
    if not preset.runs_here:
        return AbsentDevice(preset)
    if preset.api:
        return ShaderDevice(preset)
    if preset.device == "cpu":
        return CpuDevice(preset, threads)
    return CudaDevice(preset) if preset.kind == "cuda" else MetalDevice(preset)


def choose_device(
    preset: TargetPreset, threads: int, runner: str, tracker: str, key: str, linker: str, say: Callable[[str], None]
) -> Device:
    """The target's own device, or with the runner `rpc` the devices of a key; TuneBenchError for another runner."""
    own = preset.api or ("local" if preset.device == "cpu" else preset.device)
    if runner and runner not in RUNNERS:
        raise registry.unknown(runner, RUNNERS, "runner")
    if runner == "webgpu" and preset.name == "metal":
        return open_device(replace(find("webgpu"), name="metal"), threads)
    if runner not in ("", "rpc", own):
        raise TuneBenchError(f"target {preset.name!r} is not for runner {runner!r}.", f"Write --runner {own}, or rpc.")
    if runner == "rpc":
        return RpcDevice(preset, tracker, key, threads, linker, say)
    if tracker or key or linker:
        raise TuneBenchError("--tracker, --key and --linker are of --runner rpc.", "Add it, or leave them out.")
    return open_device(preset, threads)
