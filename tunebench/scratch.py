"""One folder for all temporary files of a process and its children, gone when it ends, or cleaned up by a later one.

The folder is `tunebench-<pid>-...` among the system's temporary files. Its process holds a lock on it, which goes when
the process does, however that ends: a folder without a lock is nobody's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "tunebench-"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """The folder, in which everything temporary is made within; what killed processes left is removed first."""
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    sweep(Path(tempfile.gettempdir()))
    made = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    lock = _lock(made)
    os.environ["TMPDIR"], tempfile.tempdir = str(made), str(made)  # children read the one, this process the other
    try:
        yield made
    finally:
        tempfile.tempdir = before[1]
        os.environ.update({"TMPDIR": before[0]}) if before[0] else os.environ.pop("TMPDIR", None)
        shutil.rmtree(made, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(where: Path) -> None:
    """Remove the folders of processes that are no more."""
    for path in where.glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if not pid.isdigit() or _is_alive(int(pid)):
            continue
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _is_alive(pid: int) -> bool:
    """Whether there is such a process here; one in another container may have made the folder, and holds its lock."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _lock(path: Path) -> int | None:
    """A handle that holds a folder's lock; None where another process does, or there are no such locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    handle = None
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if handle is not None:
            os.close(handle)
        return None
    return handle
