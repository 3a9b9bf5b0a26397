"""Unpacking of tar and zip archives that a stranger made: nothing is written outside the folder, and no link is followed."""

from __future__ import annotations

import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO


@dataclass(frozen=True)
class Member:
    """A file or folder in an archive."""

    name: str
    size: int
    kind: str
    """``"file"``, ``"folder"``, or what else it is."""
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a tar archive (compressed or not) or a zip archive into ``folder``, which is new or empty. Returns the files written.

    All names are checked before anything is written, and ``folder`` appears when everything in it is there. Owners,
    permissions and times in the archive are ignored.

    Raises:
        ValueError: no archive; a member with an absolute name, a name that leads out of the folder, or one that stands
            twice; a link, device or pipe; more bytes than the disk has room for; a folder that holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _members(archive) as members:
        found = list(members)
        _check(found, archive, room=shutil.disk_usage(folder.parent).free)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            _write(found, unfinished)
            unfinished.chmod(0o755)  # mkdtemp's 0700 would hide the files from a colleague
            unfinished.replace(folder)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
            raise ValueError(f"{archive} cannot be unpacked: {error}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return sum(member.kind == "file" for member in found)


def _check(members: list[Member], archive: Path, room: int) -> None:
    seen: set[PurePosixPath] = set()
    for member in members:
        path = PurePosixPath(member.name)
        # A backslash or a colon is part of a name here, but a path or a drive where the folder may be copied to.
        if path.is_absolute() or ".." in path.parts or any(c in member.name for c in "\\:\0"):
            raise ValueError(f"{archive}: {member.name!r} leads out of the folder it is to be unpacked into")
        if member.kind not in ("file", "folder"):
            raise ValueError(f"{archive}: {member.name!r} is a {member.kind}; files and folders alone are unpacked")
        if member.kind == "file" and path in seen:
            raise ValueError(f"{archive}: {member.name!r} is in it twice")
        seen.add(path)
    needed = sum(member.size for member in members)
    if needed > room:
        raise ValueError(f"{archive} unpacks to {needed} bytes, the disk has room for {room}")


def _write(members: list[Member], folder: Path) -> None:
    for member in members:
        target = folder / PurePosixPath(member.name)
        if member.kind == "folder":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, target.open("xb") as file:
            shutil.copyfileobj(source, file)


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _in_zip(file)
        return
    try:
        tar = tarfile.open(archive)  # noqa: SIM115  # closed below; errors inside are another's
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is neither a tar nor a zip archive: {error}") from None
    with tar:
        yield _in_tar(tar, archive)


def _in_zip(archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        mode = info.external_attr >> 16
        kind = "link" if stat.S_ISLNK(mode) else "folder" if info.is_dir() else "file"
        yield Member(info.filename, info.file_size, kind, lambda info=info: archive.open(info))  # type: ignore[misc]


def _in_tar(archive: tarfile.TarFile, path: Path) -> Iterator[Member]:
    def opened(info: tarfile.TarInfo) -> IO[bytes]:
        file = archive.extractfile(info)
        assert file is not None  # a regular file
        return file

    try:
        for info in archive:
            kind = (
                "file" if info.isreg() else "folder" if info.isdir() else "link" if info.issym() or info.islnk() else "device"
            )
            yield Member(info.name, info.size, kind, lambda info=info: opened(info))  # type: ignore[misc]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
