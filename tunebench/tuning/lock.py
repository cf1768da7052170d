"""One writer for a folder: a lock that the system holds for a process, and lets go when it ends, however it ends."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tunebench import durable, stored
from tunebench.errors import TuneBenchError
from tunebench.results import now

try:
    import fcntl
except ImportError:  # Windows, which has no such lock: there, two runs in one folder are the user's care
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
MOST_BYTES = 4096


class FolderLock:
    """Held from its making until `release`, by this process alone: what it starts does not inherit it."""

    def __init__(self, folder: Path, wait: Callable[[str], None] | None = None) -> None:
        """Take the lock. Where another process has it, `wait` is told and it is waited for; without, a TuneBenchError.

        OSError where the folder cannot be written.
        """
        self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | durable.HERE, 0o666)
        try:
            self._take(folder, wait)
            os.ftruncate(self._file, 0)
            os.write(self._file, _this_process())
        except BaseException:
            os.close(self._file)
            raise

    def release(self) -> None:
        """Let the next one write. A lock that was released stays so."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, folder: Path, wait: Callable[[str], None] | None) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _described(os.read(self._file, MOST_BYTES))
            if wait is None:
                raise TuneBenchError(
                    f"{folder} is being written by {holder}.", "Wait for it with --wait, or name another --work-dir."
                ) from None
            wait(f"waiting for {holder}, which writes {folder}")
            fcntl.flock(self._file, fcntl.LOCK_EX)


def _this_process() -> bytes:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:1000]
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now(), "command": command}).encode()


def _described(text: bytes) -> str:
    """Who holds a lock, as they wrote it down."""
    try:
        found = stored.decode(text)
        return f"process {found['pid']} on {found['host']} (since {found['since']}: {found['command']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
