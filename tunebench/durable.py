"""Files that are whole or not there: every write is checked, and is on the disk before anything refers to it."""

import errno
import os
from pathlib import Path

from tunebench.errors import StorageError, TuneBenchError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BROKEN = (errno.EROFS, errno.EIO)
HERE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""How to open what may come from elsewhere: a link would lead the writer out of its folder, a pipe have it wait."""


def write(path: Path, data: bytes) -> None:
    """Write a file and see it on the disk. OSError where it could not be."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | HERE, 0o666)
    try:
        _write_all(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def replace(path: Path, data: bytes) -> None:
    """Give a file other contents, so that at any moment it has the old or the new. OSError as by `write`."""
    fresh = path.with_name(f"new-{path.name}")
    fresh.unlink(missing_ok=True)
    write(fresh, data)
    os.replace(fresh, path)
    sync_folder(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add to a file all of `data`, or nothing. OSError where it could not be."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | HERE, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            _write_all(file, data)
        except BaseException:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """See a folder's names on the disk; some systems cannot open a folder, and need not."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(file)
    finally:
        os.close(file)


def refusal(path: Path, error: OSError) -> TuneBenchError:
    """Why a path cannot be written, in one line."""
    if error.errno in FULL:
        return StorageError(
            f"no space left for {path} ({error.strerror}): what was kept before is whole.",
            "Free some and run it again.",
        )
    if error.errno in BROKEN:
        return StorageError(f"cannot write to {path} ({error.strerror}): what was kept before is whole.")
    return TuneBenchError(f"cannot write to {path} ({error.strerror}).", "Name a folder with --work-dir.")


def _write_all(file: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
