"""Unpacking: what is in a harmless archive comes out, and whatever would reach outside of the folder is refused before a write."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from localsgd_ext.__main__ import main
from localsgd_ext.train import archives

FILES = {"train/cat/1.png": b"one", "train/dog/2.png": b"two", "val/cat/3.png": b"", "readme": b"x" * 100_000}


def _info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode, info.uid = kind, target, size, 0o4777, 1234
    return info


def _tar(path: Path, mode: str, *more: tarfile.TarInfo) -> None:
    with tarfile.open(path, mode) as tar:
        tar.addfile(_info("train", tarfile.DIRTYPE))
        for name, content in FILES.items():
            tar.addfile(_info(name, size=len(content)), io.BytesIO(content))
        for info in more:
            tar.addfile(info, io.BytesIO(b"evil") if info.isreg() else None)


def _zip(path: Path, *more: zipfile.ZipInfo) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("train")
        for name, content in FILES.items():
            file.writestr(name, content)
        for info in more:
            file.writestr(info, "evil")


MAKERS: dict[str, Callable[[Path], None]] = {
    "a.tar": lambda path: _tar(path, "w"),
    "a.tar.gz": lambda path: _tar(path, "w:gz"),
    "a.tar.xz": lambda path: _tar(path, "w:xz"),
    "a.zip": _zip,
}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_harmless_archive(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAKERS[name](tmp_path / name)
    assert main(["unpack", str(tmp_path / name), str(tmp_path / "deep" / "data")]) == 0
    assert f"4 files are in {tmp_path / 'deep' / 'data'}" in capsys.readouterr().out
    assert everything(tmp_path / "deep" / "data") == FILES
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["data"]
    assert not (tmp_path / "deep" / "data" / "readme").stat().st_mode & stat.S_ISUID


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "tar, parent": (lambda p: _tar(p, "w", _info("../owned", size=4)), "'../owned' leads out of the folder"),
    "tar, parent inside": (lambda p: _tar(p, "w", _info("train/../../owned", size=4)), "leads out of the folder"),
    "tar, absolute": (lambda p: _tar(p, "w", _info("/tmp/owned", size=4)), "'/tmp/owned' leads out of the folder"),
    "tar, backslash": (lambda p: _tar(p, "w", _info("..\\owned", size=4)), "leads out of the folder"),
    "tar, drive": (lambda p: _tar(p, "w", _info("C:owned", size=4)), "leads out of the folder"),
    "tar, symbolic link": (
        lambda p: _tar(p, "w", _info("door", tarfile.SYMTYPE, ".."), _info("door/owned", size=4)),
        "'door' is a link",
    ),
    "tar, hard link": (lambda p: _tar(p, "w", _info("door", tarfile.LNKTYPE, "/etc/passwd")), "'door' is a link"),
    "tar, pipe": (lambda p: _tar(p, "w", _info("pipe", tarfile.FIFOTYPE)), "'pipe' is a device"),
    "tar, device": (lambda p: _tar(p, "w", _info("disk", tarfile.BLKTYPE)), "'disk' is a device"),
    "tar, twice": (lambda p: _tar(p, "w", _info("train/cat/1.png", size=4)), "is in it twice"),
    "zip, parent": (lambda p: _zip(p, zipfile.ZipInfo("../owned")), "'../owned' leads out of the folder"),
    "zip, absolute": (lambda p: _zip(p, zipfile.ZipInfo("/tmp/owned")), "'/tmp/owned' leads out of the folder"),
    "zip, link": (lambda p: _zip(p, _link("door"), zipfile.ZipInfo("door/owned")), "'door' is a link"),
    "no archive": (lambda p: p.write_bytes(b"none") and None, "is neither a tar nor a zip archive"),
    "empty": (lambda p: p.write_bytes(b"") and None, "is neither a tar nor a zip archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_writes_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = HOSTILE[case]
    archive = tmp_path / "archive"
    make(archive)
    assert main(["unpack", str(archive), str(tmp_path / "data")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Error: ")
    assert message in shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_damaged_archive_leaves_no_half_of_a_folder(name: str, tmp_path: Path) -> None:
    archive = tmp_path / name
    MAKERS[name](archive)
    content = bytearray(archive.read_bytes())
    if name == "a.zip":
        content[content.index(b"readme") + 30] ^= 0xFF  # of that file's bytes
        archive.write_bytes(content)
    else:
        archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        archives.unpack(archive, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_overwritten_and_the_disk_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _zip(tmp_path / "a.zip")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "data")
    assert everything(tmp_path / "data") == {"precious": b"mine"}
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 99_999})())
    with pytest.raises(ValueError, match=r"unpacks to 100006 bytes, the disk has room for 99999"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_archive_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unpack", str(tmp_path / "none.tar"), str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err == f"Error: No such file or directory: {tmp_path / 'none.tar'}\n"
