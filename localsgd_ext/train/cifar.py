"""CIFAR-10 and CIFAR-100 as they are published, unpacked or in their archive. Nothing in the files can run code.

The files are pickles of Python 2, which by themselves may call anything. They are believed only if their checksum is the published
one, and even then no function is called but those that make a numpy array.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # pictures [N, 32, 32, 3], labels [N]

# numpy calls its own function by two names, an old and a new one.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def load(name: str, root: Path) -> tuple[Split, Split, int]:
    """The training set, the test set and the number of classes of ``"cifar10"`` or ``"cifar100"``.

    Args:
        root: the folder in which the published archive, or the folder in it, lies.
    Raises:
        ValueError: a file is missing (it is said where to get it), damaged, or holds something else.
    """
    published = _published(name)
    read = _reader(published, name, root)
    meta = published.meta
    classes = _unpickled(read(meta["filename"], meta["md5"]), meta["filename"])
    train, test = (
        [_split(_unpickled(read(file, md5), file), file) for file, md5 in files]
        for files in (published.train_list, published.test_list)
    )
    return _joined(train), _joined(test), len(_entry(classes, meta["filename"], (meta["key"],)))


def where(name: str, root: Path) -> str:
    """Where to get the data set ``name``, and how to put it under ``root``."""
    published = _published(name)
    return f"download {published.url} (MD5 {published.tgz_md5}) to {root}; it need not be unpacked"


def _published(name: str) -> Any:
    """File names and checksums, of torchvision."""
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]


def _reader(published: Any, name: str, root: Path) -> Callable[[str, str], bytes]:
    """A function of a file's name and its MD5 that returns the bytes that were checked."""
    folder, archive = root / published.base_folder, root / published.filename
    members: Mapping[str, bytes] = {}
    if not folder.is_dir() and archive.is_file():
        content = archive.read_bytes()
        _require(content, published.tgz_md5, archive, name, root)
        members = _members(content, published.base_folder, archive)

    def read(file: str, md5: str) -> bytes:
        path = folder / file
        if file in members:
            content = members[file]
        elif path.is_file():
            content = path.read_bytes()
        else:
            raise ValueError(f"{path} is missing; {where(name, root)}")
        _require(content, md5, path, name, root)
        return content

    return read


def _require(content: bytes, md5: str, path: Path, name: str, root: Path) -> None:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is damaged (its MD5 is not {md5}); {where(name, root)}")


def _members(content: bytes, folder: str, archive: Path) -> dict[str, bytes]:
    """The files of an archive that lie directly in ``folder``, by name. They are read, never unpacked: no path is followed."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                parent, _, name = member.name.rpartition("/")
                if member.isreg() and parent == folder and (file := tar.extractfile(member)) is not None:
                    members[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is not a tar archive: {error}") from None
    return members


class _ArraysAlone(pickle.Unpickler):
    """Makes numbers, strings, containers and numpy arrays of them; everything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return _ALLOWED[module, name]


def _unpickled(content: bytes, file: str) -> Any:
    try:
        return _ArraysAlone(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its instructions end in
        raise ValueError(f"{file} is not a file of CIFAR: {error}") from None


def _entry(value: Any, file: str, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if isinstance(value, dict) and key in value:
            return value[key]
    raise ValueError(f"{file} is not a file of CIFAR: it has no {' or '.join(keys)}")


def _split(value: Any, file: str) -> Split:
    pictures, labels = _entry(value, file, ("data",)), _entry(value, file, ("labels", "fine_labels"))
    if not (isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.shape == (len(labels), 3072)):
        raise ValueError(f"{file} is not a file of CIFAR: its data must be {len(labels)} rows of 3072 bytes")
    return pictures.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels, np.int64)


def _joined(splits: list[Split]) -> Split:
    pictures, labels = zip(*splits, strict=True)
    return np.ascontiguousarray(np.concatenate(pictures)), np.concatenate(labels)
