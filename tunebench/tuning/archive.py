"""A database as one file, a zip: its promoted records and decisions, what they are for, and a SHA-256 of each part.

An archive from elsewhere is data: its names, sizes and hashes are checked before anything is read, its lines as those
of any database that this machine did not write, and all of it before anything is written.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from tunebench import durable, stored
from tunebench.errors import TuneBenchError, one_line
from tunebench.tuning import content, files, verify, vetting
from tunebench.tuning.content import Content
from tunebench.tuning.entry import Provenance
from tunebench.tuning.files import FILES, OURS, PROVENANCE, VERDICTS

FORMAT = 1
MANIFEST = "manifest.json"
MEMBERS = (PROVENANCE, VERDICTS, *FILES, *(f"{OURS}/{name}" for name in FILES))
"""What an archive may hold beside its manifest."""
REQUIRED = frozenset({PROVENANCE, VERDICTS, *FILES})
MOST_BYTES = 1 << 30  # of all members together
MOST_MANIFEST_BYTES = 1 << 16
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the time of every member, so that the same content is the same file
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, struct.error, zlib.error, zipfile.BadZipFile)
MOST_DIRECTORY_BYTES = 1 << 12  # of the list of members
NOT_ONE = "It is no file of `tunebench db export`, or it was changed since: get it again."


class Member(Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest says of a part."""

    bytes: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What an archive is."""

    format: int
    folder: str  # the database's name
    provenance: Provenance
    members: dict[str, Member]


def write(folder: Path, path: Path) -> Manifest:
    """Export a folder's database to one file, the same bytes for the same content.

    TuneBenchError where anything of it is no good, where its name is not that of a database, or nothing can be written.
    """
    found = content.read(folder)
    if found.problems:
        raise TuneBenchError(found.problems[0], f"Nothing was exported. `tunebench db verify {folder}` says more.")
    name = folder.resolve().name
    _check_name(name, found.made, f"Name it <target>{files.folder_name('', found.made)}.")
    parts = {**content.as_files(found.lines, found.entries), PROVENANCE: content.as_json(found.made)}
    members = {each: Member(len(parts[each]), hashlib.sha256(parts[each]).hexdigest()) for each in sorted(parts)}
    manifest = Manifest(FORMAT, name, found.made, members)
    try:
        durable.replace(path, _zipped({MANIFEST: content.as_json(manifest), **dict(sorted(parts.items()))}))
    except OSError as error:
        raise durable.refusal(path, error) from None
    return manifest


def _zipped(parts: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name, LONG_AGO)
            info.external_attr, info.create_system = (stat.S_IFREG | 0o644) << 16, 3
            archive.writestr(info, data, zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def read(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """An archive's manifest and parts, each of the length and hash that it is to have; else a TuneBenchError."""
    try:
        packed = stored.read_bytes(path, MOST_BYTES)
        _check_directory(packed)
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            infos = _checked_infos(archive)
            data = _member(archive, infos[MANIFEST], MOST_MANIFEST_BYTES)
            manifest = msgspec.json.decode(data, type=Manifest)
            parts = {name: _member(archive, info, info.file_size) for name, info in infos.items() if name != MANIFEST}
    except UNREADABLE as error:
        raise TuneBenchError(f"cannot read {path} ({one_line(str(error))}).", NOT_ONE) from None
    wrong = _wrong(manifest, parts)
    if wrong:
        raise TuneBenchError(f"{path}: {wrong}.", NOT_ONE)
    return manifest, parts


def _check_directory(packed: bytes) -> None:
    """ValueError where the list of members is no short one at the end, before any of it is made an object of."""
    end = packed[-22:]
    plain = len(end) == 22 and end[:4] == b"PK\5\6" and packed[-42:-38] != b"PK\6\7"
    if not plain or struct.unpack("<L", end[12:16])[0] > MOST_DIRECTORY_BYTES:
        raise ValueError("it is no zip file of a few members")


def _checked_infos(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name; a ValueError where there is any that may not be, before one is unpacked."""
    infos = archive.infolist()
    found = {info.filename: info for info in infos}
    if len(found) != len(infos):
        raise ValueError("a name stands in it twice")
    unknown = next((name for name in found if name not in (MANIFEST, *MEMBERS)), None)
    if unknown is not None:
        raise ValueError(f"it holds {unknown!r:.80}, which is no part of a database")
    missing = next((name for name in (MANIFEST, *sorted(REQUIRED)) if name not in found), None)
    if missing:
        raise ValueError(f"it has no {missing}")
    for info in infos:
        if stat.S_ISLNK(info.external_attr >> 16) or info.compress_type not in PACKED:
            raise ValueError(f"{info.filename} is a link, or packed in another way")
        if info.file_size > files.MOST_BYTES:
            raise ValueError(f"{info.filename} is larger than {files.MOST_BYTES >> 20} MiB")
    if sum(info.file_size for info in infos) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB when unpacked")
    return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """A member's bytes, never more than it says that it has."""
    with archive.open(info) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{info.filename} is larger than it says")
    return data


def _wrong(manifest: Manifest, parts: Mapping[str, bytes]) -> str:
    if manifest.format != FORMAT:
        return f"it is of format {manifest.format}, and this TuneBench reads {FORMAT}"
    if set(manifest.members) != set(parts):
        return "its manifest names other parts than it has"
    for name, member in manifest.members.items():
        if (len(parts[name]), hashlib.sha256(parts[name]).hexdigest()) != (member.bytes, member.sha256):
            return f"{name} is not what its checksum says"
    return ""


def unpack(path: Path, root: Path) -> tuple[Path, Content]:
    """Import an archive as a folder of `root`, whole or not at all.

    TuneBenchError where there is such a database already, where any part or line of it is no good, or no disk space.
    """
    manifest, parts = read(path)
    _check_name(manifest.folder, manifest.provenance, NOT_ONE)
    folder = root / manifest.folder
    if folder.exists() or folder.is_symlink():
        raise TuneBenchError(
            f"there is a {folder} already.",
            f"Import it with another --work-dir, then make them one: tunebench db merge IMPORTED --into {folder}.",
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    except OSError as error:
        raise durable.refusal(root, error) from None
    try:
        return folder, _placed(path, manifest, parts, staged, folder)
    except OSError as error:
        raise durable.refusal(folder, error) from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _placed(path: Path, manifest: Manifest, parts: Mapping[str, bytes], staged: Path, folder: Path) -> Content:
    """Write beside, check as a database from elsewhere, and rename."""
    for name, data in parts.items():
        (staged / name).parent.mkdir(exist_ok=True)
        durable.write(staged / name, data)
    found = content.read(staged)
    problems = [str(problem).replace(f"{staged}/", "") for problem in verify.check_lines(found)[1]]
    if found.made != manifest.provenance:
        problems.append("its manifest and its provenance are not for the same")
    if problems:
        raise TuneBenchError(f"{path}: {problems[0]}", f"Nothing was imported; {len(problems)} such in all.")
    for each in [part for part in (staged / OURS, staged) if part.is_dir()]:
        each.chmod(0o755)
        durable.sync_folder(each)
    staged.rename(folder)
    durable.sync_folder(folder.parent)
    for part in found.parts:
        vetting.remember(part, folder / OURS if part.folder.name == OURS else folder)
    return found


def _check_name(name: str, made: Provenance, hint: str) -> None:
    suffix = files.folder_name("", made)
    if not (NAME.fullmatch(name) and name.endswith(suffix) and len(name) > len(suffix)):
        raise TuneBenchError(f"{name[:80]!r} is no name of a database for {made.device}.", hint)
