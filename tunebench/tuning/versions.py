"""A folder of files that change together: `versions/<n>` holds each version whole, the link `promoted` names the one.

A folder without the link is its own and only version, as databases were before.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tunebench import durable
from tunebench.errors import TuneBenchError

LINK = "promoted"
VERSIONS = "versions"
NAME = re.compile(rf"{VERSIONS}/([1-9]\d{{0,17}})")


def current(folder: Path) -> Path:
    """Where the files of a folder are now. TuneBenchError where the link leads anywhere but to a version."""
    link = folder / LINK
    if not os.path.lexists(link):
        return folder
    if not (link.is_symlink() and NAME.fullmatch(os.readlink(link))):
        raise TuneBenchError(
            f"{link} does not name one of {folder / VERSIONS}.", "Link it to the last one, or move that folder away."
        )
    version = folder / os.readlink(link)
    if not version.is_dir() and folder / os.readlink(link) == version:  # else a writer was faster
        raise TuneBenchError(
            f"{link} names {version.name}, which is not there.", f"Link it to one of {folder / VERSIONS}."
        )
    for each in (version.parent, version, *map(Path, _folders(version))):
        if each.is_symlink():
            raise TuneBenchError(f"{each} leads out of its folder.", "Name another --work-dir.")
    return version


def _folders(version: Path) -> list[str]:
    """Those in a version, which another process may remove meanwhile."""
    return [os.path.join(at, name) for at, names, _ in os.walk(version) for name in names]


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Make `files`, by their paths in a version, the current version, and give its folder.

    Whenever this is interrupted, by an OSError or an end of the process, the old version or the new one is there whole.
    """
    before = current(folder)
    version = folder / VERSIONS / str(1 + max(_numbers(folder), default=0))
    try:
        _write(version, files)
    except OSError:
        shutil.rmtree(version, ignore_errors=True)
        raise
    fresh = folder / f"new-{LINK}"
    fresh.unlink(missing_ok=True)
    os.symlink(f"{VERSIONS}/{version.name}", fresh)
    os.replace(fresh, folder / LINK)
    durable.sync_folder(folder)
    for number in _numbers(folder):  # a reader may still be at the one before
        if str(number) not in (before.name, version.name):
            shutil.rmtree(folder / VERSIONS / str(number), ignore_errors=True)
    return version


def all_of(folder: Path) -> list[Path]:
    """Every version that a folder has, the oldest first."""
    return [folder / VERSIONS / str(number) for number in sorted(_numbers(folder))]


def _write(version: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        durable.write(version / name, data)
    for folder in {(version / name).parent for name in files} | {version, version.parent, version.parent.parent}:
        durable.sync_folder(folder)
    for name, data in files.items():
        if (version / name).read_bytes() != data:
            raise OSError(errno.EIO, "what was written is not what is read back", str(version / name))


def _numbers(folder: Path) -> list[int]:
    names = [f"{VERSIONS}/{path.name}" for path in (folder / VERSIONS).glob("*")]
    return [int(found[1]) for found in map(NAME.fullmatch, names) if found]
