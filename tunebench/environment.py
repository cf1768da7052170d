"""The machine, its load and the library versions at the time of a run. Never imports TVM, never raises.

Linux, macOS and Windows. What a system does not tell is None. Units: bytes, Hz.
"""

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from tunebench import __version__, installation, sysfs
from tunebench.errors import TuneBenchError
from tunebench.spec import Count

ASSUMED_CACHE_BYTES = 32 << 20  # the last-level cache of a machine that does not tell

ISA = frozenset(
    [
        *("avx2", "fma", "f16c", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
        *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("neon", "fp16", "bf16", "dotprod", "i8mm", "sve", "sve2", "sme"),
    ]
)
"""The instruction sets that change which kernel is fast, named as Linux names x86's and Arm names its own."""

ISA_ALIASES = {"asimd": "neon", "advsimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "avx2_0": "avx2"}
WINDOWS_ISA = {19: "neon", 40: "avx2", 41: "avx512f", 43: "dotprod"}  # PF_* of IsProcessorFeaturePresent


def describe() -> dict[str, Any]:
    """What a reader needs to judge a measurement made now on this machine; JSON types only."""
    return {
        "cpu": _cpu(),
        "memory": {"total_bytes": psutil.virtual_memory().total, "available_bytes": available_memory_bytes()},
        "gpus": gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(),
        "load_average": load_average(),
    }


def _cpu() -> dict[str, Any]:
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable_cores(),
        "isa": sorted(isa()),
        "cache_bytes": cache_bytes(),
        "frequency_hz": cpu_frequency_hz(),
        "governor": sysfs.text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or None,
    }


def device_slug(name: str) -> str:
    """A device's name as a folder name of [a-z0-9-], without trademarks, core counts and clocks.

    `Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz` -> `intel-xeon-platinum-8481c`.
    """
    noise = r"\((r|tm|c)\)|@.*|\b\d+-core\b|\b(cpu|processor)\b"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(noise, " ", name.lower())).strip("-") or "unknown"


@functools.lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name as its maker gives it, e.g. `AMD EPYC 9554 64-Core Processor`."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    elif sys.platform == "win32":
        name = _windows_cpu_name()
    else:
        name = _linux_cpu_name()
    return name or platform.processor() or platform.machine() or "unknown"


def _linux_cpu_name() -> str:
    name = _cpuinfo().get("model name", "")
    if name:
        return name
    listed = re.search(r"^Model name:\s*(\S.*)$", _output("lscpu"), re.MULTILINE)  # Arm: the kernel knows numbers only
    return listed[1].strip() if listed else ""


def _windows_cpu_name() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except OSError:
        return ""


@functools.lru_cache(maxsize=1)
def isa() -> frozenset[str]:
    """Those of `ISA` that this CPU and its system offer."""
    if sys.platform == "darwin":
        found = re.findall(r"^hw\.optional\.(\w[\w.]*): 1$", _output("sysctl", "hw.optional"), re.MULTILINE)
        return _known_isa(name.lower().removeprefix("arm.").removeprefix("feat_") for name in found)
    if sys.platform == "win32":
        return _windows_isa()
    info = _cpuinfo()
    return _known_isa((info.get("flags") or info.get("features") or "").split())


def _known_isa(names: Iterable[str]) -> frozenset[str]:
    return ISA & {ISA_ALIASES.get(name, name) for name in names}


def _windows_isa() -> frozenset[str]:
    if sys.platform != "win32":
        return frozenset()
    import ctypes

    present = ctypes.windll.kernel32.IsProcessorFeaturePresent
    return frozenset(name for number, name in WINDOWS_ISA.items() if present(number))


@functools.lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, keys in lower case; empty where there is none."""
    first = sysfs.text(Path("/proc/cpuinfo")).partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


@functools.lru_cache(maxsize=1)
def cache_bytes() -> dict[str, int]:
    """Bytes of data cache by level (`l1d`, `l2`, `l3`), all instances of the machine together; {} if not told."""
    if sys.platform == "darwin":
        return _darwin_cache_bytes()
    if sys.platform == "win32":
        return _windows_cache_bytes()
    return _linux_cache_bytes(Path("/sys/devices/system/cpu"))


def _linux_cache_bytes(cpus: Path) -> dict[str, int]:
    instances: dict[tuple[str, str], int] = {}
    for index in cpus.glob("cpu[0-9]*/cache/index*"):
        size = re.fullmatch(r"(\d+)K", sysfs.text(index / "size"))
        if size and sysfs.text(index / "type") != "Instruction":
            level = sysfs.text(index / "level")
            instances[level, sysfs.text(index / "shared_cpu_list")] = int(size[1]) << 10
    totals: dict[str, int] = {}
    for (level, _), size_bytes in sorted(instances.items()):
        name = "l1d" if level == "1" else f"l{level}"
        totals[name] = totals.get(name, 0) + size_bytes
    return totals


def _darwin_cache_bytes() -> dict[str, int]:
    found = re.findall(r"^hw\.(perflevel\d\.)?(l1d|l2|l3)cachesize: (\d+)$", _output("sysctl", "hw"), re.MULTILINE)
    totals: dict[str, int] = {}
    for _, name, size in found:  # the plain line repeats one cluster: the largest stands for the machine
        totals[name] = max(totals.get(name, 0), int(size))
    return {name: size for name, size in totals.items() if size}


def _windows_cache_bytes() -> dict[str, int]:
    script = "Get-CimInstance Win32_Processor | ForEach-Object { '{0} {1}' -f $_.L2CacheSize, $_.L3CacheSize }"
    rows = re.findall(r"^(\d+) (\d+)\s*$", _output("powershell", "-NoProfile", "-Command", script), re.MULTILINE)
    totals = {"l2": sum(int(l2) << 10 for l2, _ in rows), "l3": sum(int(l3) << 10 for _, l3 in rows)}
    return {name: size for name, size in totals.items() if size}


def last_level_cache_bytes() -> int:
    """Bytes of the outermost cache level, all its instances together; ASSUMED_CACHE_BYTES if not told."""
    sizes = cache_bytes()
    return sizes[max(sizes)] if sizes else ASSUMED_CACHE_BYTES


def available_memory_bytes() -> int:
    """Bytes that this process can still take without swapping, within its container's limit."""
    available: int = psutil.virtual_memory().available
    return max(0, min(available, sysfs.memory_left_bytes()))


def usable_cores(root: Path = sysfs.ROOT) -> int:
    """Logical cores that this process may keep busy: those it may run on, and no more than its CPU quota pays for.

    Threads beyond a quota are stopped amid a measurement, so a quota of 2.5 cores is 2. A cpuset shows in the affinity.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores, quota = len(os.sched_getaffinity(0)), sysfs.cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def check_threads(threads: int, cores: int, whose: str = "this process may use") -> None:
    """Raise a TuneBenchError for more threads than cores: rows would be labelled with what never ran."""
    if threads > cores:
        raise TuneBenchError(
            f"--threads {threads} is more than the {cores} core{'s' * (cores != 1)} that {whose}.",
            f"Write --threads {cores}, or leave it out for all of them.",
        )


def set_threads(count: int) -> None:
    """Let TVM's kernels use `count` threads in this process; it must come before the first of them runs."""
    os.environ["TVM_NUM_THREADS"] = str(count)


def cpu_frequency_hz() -> float | None:
    """The clock now, averaged over the cores."""
    try:
        frequency = psutil.cpu_freq()
    except Exception:  # psutil raises whatever the system does where it has no clock to read
        return None
    return round(frequency.current * 1e6) if frequency and frequency.current else None


def load_average() -> list[float] | None:
    """Runnable processes, averaged over 1, 5 and 15 minutes."""
    if sys.platform == "win32":
        return None
    try:
        return list(os.getloadavg())
    except OSError:
        return None


def gpus() -> list[dict[str, Any]]:
    """NVIDIA's GPUs: name, driver, memory and the streaming multiprocessors' clock now; [] if there are none."""
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm"
    rows = _output("nvidia-smi", query, "--format=csv,noheader,nounits").splitlines()
    fields = [[field.strip() for field in row.split(",")] for row in rows]
    return [_gpu(*row) for row in fields if len(row) == 4]


def hold_nvidia_clocks() -> bool:
    """Keep an idle CUDA context in this process until it ends; whether there is one.

    Without any, NVIDIA's driver was seen to run short launches of other APIs at clocks of an idle GPU, a fifth of
    what it has under load, and to go up and down amid a measurement.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    context = ctypes.c_void_p()
    return not driver.cuInit(0) and not driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)


def cuda_arch() -> str:
    """The first GPU's architecture as CUDA names it, e.g. sm_90; a TuneBenchError where there is none."""
    found = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    if not found:
        raise TuneBenchError(
            "there is no NVIDIA GPU here to run on.", "Name one to compile for, e.g. --target nvidia/nvidia-h100."
        )
    return "sm_" + found[0].strip().replace(".", "")


def _gpu(name: str, driver: str, memory_mib: str, clock_mhz: str) -> dict[str, Any]:
    return {
        "name": name,
        "driver": driver,
        "memory_bytes": int(memory_mib) << 20 if memory_mib.isdigit() else None,
        "clock_hz": int(clock_mhz) * 1_000_000 if clock_mhz.isdigit() else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of the libraries that change a result; None for one that is not installed."""
    return {
        "tunebench": __version__,
        "tvm": _version("apache-tvm", "tvm"),
        "tvm_ffi": _version("apache-tvm-ffi"),
        "xgboost": _version("xgboost-cpu", "xgboost"),
        "numpy": _version("numpy"),
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def git_state() -> dict[str, Any] | None:
    """The commit of the checkout that TuneBench runs from, and whether tracked files differ from it."""
    root = installation.checkout()
    if root is None or not (root / ".git").exists():  # either may lie inside somebody else's repository
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changes)} if commit else None


class PeakRss:
    """The most resident memory this process had since the object was made.

    Only Linux can start the count anew; elsewhere it is the peak of the whole process, and `read` says so.
    """

    def __init__(self) -> None:
        self._since = "since reset" if _reset_peak_rss() else "of the whole process"

    def read(self) -> Count:
        """Bytes, and the name of the counter."""
        if sys.platform == "win32":
            return Count(psutil.Process().memory_info().peak_wset, f"PeakWorkingSetSize {self._since}")
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", sysfs.text(Path("/proc/self/status")), re.MULTILINE)
        if peak:
            return Count(int(peak[1]) << 10, f"VmHWM {self._since}")
        import resource

        unit = 1 if sys.platform == "darwin" else 1 << 10
        return Count(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss of the whole process")


def _reset_peak_rss() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _output(*command: str, timeout_s: float = 10) -> str:
    """What a command prints; empty where it is missing, fails or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=timeout_s
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
