"""What Linux tells in files: control groups, which leave a process less than the machine has. Never raises.

`root` is the file system's root, for a test that makes one up. Where a system has no such files, nothing is limited.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60  # a control group's memory limit from here on means none


def text(path: Path) -> str:
    """A system file's text without surrounding space; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def control_groups(controller: str, root: Path = ROOT) -> list[Path]:
    """Folders of this process's group for a controller and of all its parents, innermost first; both versions'."""
    return list(dict.fromkeys(_control_groups(controller, root)))


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    mounted = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = [mounted, mounted / "unified"]  # of version 2, which has one hierarchy for all controllers
        if controllers:
            mounts = [mounted / controllers, mounted / controller] if controller in controllers.split(",") else []
        own = PurePosixPath("/" if ".." in path else path)  # of a group outside the namespace that this process sees
        for mount in mounts:
            yield from (mount / str(group).lstrip("/") for group in (own, *own.parents))


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many cores' time the tightest control group gives this process; None where there is no limit."""
    quotas = [_quota(group) for group in control_groups("cpu", root)]
    return min((quota for quota in quotas if quota), default=None)


def _quota(group: Path) -> float | None:
    """Of one group: version 2's file, or else the two of version 1."""
    words = text(group / "cpu.max").split()
    words = words or [text(group / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


def quota_throttle_count(root: Path = ROOT) -> int | None:
    """How often this process's control groups were stopped because their CPU quota was used up; None if unknown."""
    found = [re.search(r"^nr_throttled (\d+)$", text(group / "cpu.stat"), re.MULTILINE)
             for group in control_groups("cpu", root)]  # fmt: skip
    counts = [int(each[1]) for each in found if each]
    return sum(counts) if counts else None


def memory_left_bytes(root: Path = ROOT) -> int:
    """What the tightest control group leaves; NO_LIMIT_BYTES where there is none."""
    return min(map(_memory_left_bytes, control_groups("memory", root)), default=NO_LIMIT_BYTES)


def _memory_left_bytes(group: Path) -> int:
    """Of one group: version 2's file names, then 1's."""
    limit = text(group / "memory.max") or text(group / "memory.limit_in_bytes")
    used = text(group / "memory.current") or text(group / "memory.usage_in_bytes")
    if not (limit.isdigit() and used.isdigit()):
        return NO_LIMIT_BYTES
    file_pages = re.search(r"^(?:total_)?inactive_file (\d+)$", text(group / "memory.stat"), re.MULTILINE)
    return min(NO_LIMIT_BYTES, int(limit) - int(used) + (int(file_pages[1]) if file_pages else 0))
