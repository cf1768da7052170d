"""The machine's description: complete, JSON, and without surprises on systems that tell less."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench import environment, installation, sysfs
from tunebench.errors import TuneBenchError

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    """Before a test, and after it: what it made up is no other test's machine."""
    functions = (environment.cpu_name, environment.isa, environment.cache_bytes, environment._cpuinfo)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)


def test_describe_is_json_and_complete() -> None:
    found = json.loads(json.dumps(environment.describe()))
    assert set(found) == {"cpu", "memory", "gpus", "os", "python", "versions", "git", "load_average"}
    assert found["cpu"]["usable_cores"] >= 1
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["versions"]["tunebench"]


@pytest.mark.usefixtures("no_commands")
def test_describe_without_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.sysfs, "text", lambda path: "")
    found = environment.describe()
    assert found["gpus"] == []
    assert found["cpu"]["cache_bytes"] == {}
    assert found["cpu"]["name"]
    assert environment.last_level_cache_bytes() == environment.ASSUMED_CACHE_BYTES


def test_a_command_that_hangs_is_given_up() -> None:
    assert environment._output(sys.executable, "-c", "import time; time.sleep(60)", timeout_s=0.2) == ""


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_the_module_loads_on_every_system(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "winreg", None)
    assert "describe" in runpy.run_path(environment.__file__)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 9554 64-Core Processor", "amd-epyc-9554"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Apple M3 Max", "apple-m3-max"),
        ("", "unknown"),
    ],
)
def test_device_slug(name: str, slug: str) -> None:
    assert environment.device_slug(name) == slug


@given(st.text())
def test_a_slug_is_a_folder_name_and_stays_itself(name: str) -> None:
    slug = environment.device_slug(name)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    again = environment.device_slug(slug)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", again)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni\n\nflags : other", {"avx2", "avx512f", "avx512_vnni"}),
        ("Features\t: fp asimd asimdhp asimddp i8mm", {"neon", "fp16", "dotprod", "i8mm"}),
        ("", set()),
    ],
)
def test_isa_on_linux(cpuinfo: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(environment.sysfs, "text", lambda path: cpuinfo)
    assert environment.isa() == expected


def test_isa_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_SME: 0\nhw.optional.neon: 1\nhw.optional.avx2_0: 1"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment, "_output", lambda *command: printed)
    assert environment.isa() == {"dotprod", "neon", "avx2"}


def test_caches_of_linux_are_summed_over_instances(tmp_path: Path) -> None:
    for cpu in range(4):
        _cache(tmp_path, cpu, 0, level=1, kind="Data", size="32K", shared=str(cpu))
        _cache(tmp_path, cpu, 1, level=1, kind="Instruction", size="32K", shared=str(cpu))
        _cache(tmp_path, cpu, 2, level=3, kind="Unified", size="16384K", shared="0-1" if cpu < 2 else "2-3")
    assert environment._linux_cache_bytes(tmp_path) == {"l1d": 4 * 32 << 10, "l3": 32 * MIB}


def _cache(cpus: Path, cpu: int, index: int, *, level: int, kind: str, size: str, shared: str) -> None:
    folder = cpus / f"cpu{cpu}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{value}\n")


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """A made-up file system."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V1, V2 = "4:memory:/box/inner\n3:cpu,cpuacct:/box/inner\n0::/", "0::/box/inner"
CFS = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, sysfs.NO_LIMIT_BYTES),
        ({"sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, sysfs.NO_LIMIT_BYTES),
        (
            {
                "sys/fs/cgroup/box/memory.max": "100",
                "sys/fs/cgroup/box/memory.current": "70",
                "sys/fs/cgroup/box/memory.stat": "anon 9\ninactive_file 20\n",
                "sys/fs/cgroup/box/inner/memory.max": "500",
                "sys/fs/cgroup/box/inner/memory.current": "0",
            },
            50,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "100",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "70",
            },
            30,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "70",
            },
            sysfs.NO_LIMIT_BYTES,
        ),
    ],
)
def test_a_containers_memory_limit_counts(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert sysfs.memory_left_bytes(lay_out(tmp_path, {"proc/self/cgroup": V2} | files)) == expected


@pytest.mark.parametrize(
    ("files", "quota", "cores"),
    [
        ({}, None, 8),
        ({"proc/self/cgroup": V2}, None, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/box/inner/cpu.max": "max 100000"}, None, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/box/inner/cpu.max": "350000 100000"}, 3.5, 3),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/box/inner/cpu.max": "50000 100000"}, 0.5, 1),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/box/inner/cpu.max": "9900000 100000"}, 99, 8),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/box/inner/cpu.max": "600000 100000",
                "sys/fs/cgroup/box/cpu.max": "200000 100000",
            },
            2,
            2,
        ),
        ({"proc/self/cgroup": "0::/../../other", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4, 4),
        ({"proc/self/cgroup": V1, f"{CFS}/cpu.cfs_quota_us": "-1", f"{CFS}/cpu.cfs_period_us": "100000"}, None, 8),
        (
            {
                "proc/self/cgroup": V1,
                f"{CFS}/box/inner/cpu.cfs_quota_us": "-1",
                f"{CFS}/box/inner/cpu.cfs_period_us": "100000",
                f"{CFS}/cpu.cfs_quota_us": "250000",
                f"{CFS}/cpu.cfs_period_us": "50000",
            },
            5,
            5,
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has control groups")
def test_a_cpu_quota_counts(
    files: dict[str, str], quota: float | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))  # what a cpuset of eight leaves
    root = lay_out(tmp_path, files)
    assert sysfs.cpu_quota(root) == quota
    assert environment.usable_cores(root) == cores


def test_how_often_a_quota_was_used_up(tmp_path: Path) -> None:
    assert sysfs.quota_throttle_count(tmp_path) is None
    stat = {"sys/fs/cgroup/box/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_usec 77", "proc/self/cgroup": V2}
    assert sysfs.quota_throttle_count(lay_out(tmp_path, stat)) == 4


def test_more_threads_than_cores_are_refused() -> None:
    environment.check_threads(2, 2)
    with pytest.raises(TuneBenchError, match=r"--threads 99 is more than the 2 cores .*Write --threads 2,"):
        environment.check_threads(99, 2)


def test_gpus_parse_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 1980\nNVIDIA GH200, 570.86.15, [N/A], [N/A]"
    monkeypatch.setattr(environment, "_output", lambda *command: printed)
    first, second = environment.gpus()
    assert first == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver": "570.86.15",
        "memory_bytes": 81559 * MIB,
        "clock_hz": 1_980_000_000,
    }
    assert second["memory_bytes"] is None
    assert second["clock_hz"] is None


def test_an_installed_package_reports_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()  # of somebody else's repository, into which it was installed
    (tmp_path / "tunebench" / "workloads").mkdir(parents=True)
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "tunebench")
    monkeypatch.setattr(environment, "_output", lambda *command: "c0ffee")
    assert environment.git_state() is None
    (tmp_path / "tunebench" / "workloads").rmdir()
    assert environment.git_state() == {"commit": "c0ffee", "modified": True}


_PEAKS = """
import json
from tunebench import environment, installation, sysfs
from tunebench.errors import TuneBenchError

def touch():
    bytearray(b"1") * (64 << 20)

first = environment.PeakRss()
before = first.read()
touch()
after = first.read()
print(json.dumps([before.bytes, after.bytes, after.counter, environment.PeakRss().read().bytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start the count anew")
def test_peak_rss_counts_what_came_and_went() -> None:
    """In a process of its own: what the other tests leave to the collector must not count."""
    printed = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True).stdout
    before, after, counter, anew = json.loads(printed)
    assert after >= before
    if "reset" in counter:
        assert after - before > 48 * MIB
        assert after - anew > 48 * MIB


def test_a_peak_that_cannot_start_anew_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert "of the whole process" in environment.PeakRss().read().counter
