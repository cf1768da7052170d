"""One writer for a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunebench.errors import TuneBenchError
from tunebench.tuning.lock import NAME, FolderLock

HOLD = """
import sys; from pathlib import Path; from tunebench.tuning.lock import FolderLock
lock = FolderLock(Path(sys.argv[1])); print("held", flush=True); sys.stdin.readline()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is told something."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(
            TuneBenchError, match=rf"is being written by process {process.pid} on .* .since 20"
        ) as caught:
            FolderLock(tmp_path)
        assert str(tmp_path) in caught.value.message
        assert "--wait" in caught.value.hint
        assert "--work-dir" in caught.value.hint


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        FolderLock(tmp_path).release()


def test_waiting_ends_when_the_holder_lets_go(tmp_path: Path) -> None:
    told: list[str] = []
    with holder(tmp_path) as process:

        def tell(words: str) -> None:
            told.append(words)
            assert process.stdin
            process.stdin.write("go\n")
            process.stdin.flush()

        FolderLock(tmp_path, tell).release()
        assert str(process.pid) in told[0]


def test_what_a_process_starts_does_not_hold_its_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(b"begun\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"begun\n"
        lock.release()
        FolderLock(tmp_path).release()
        child.kill()


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"[]", b'{"pid": 1}', b"9" * 10000])
def test_whatever_the_file_says_the_lock_is_held(text: bytes, tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / NAME).write_bytes(text)
    with pytest.raises(TuneBenchError, match="being written by another process"):
        FolderLock(tmp_path)
    lock.release()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "db").mkdir()
    os.symlink(tmp_path / "precious", tmp_path / "db" / NAME)
    with pytest.raises(OSError, match="symbolic links"):
        FolderLock(tmp_path / "db")
    assert (tmp_path / "precious").read_text() == "kept"
