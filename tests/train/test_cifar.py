"""CIFAR's files and archives: read as published, refused if anything about them is not."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from localsgd_ext.train import cifar, data, datasets
from localsgd_ext.train.config import RunConfig, resolve


def _config(name: str, **flags: Any) -> RunConfig:
    return resolve(name, "small_resnet", "sgd", **{"device": "cpu", "batch_size": 16, **flags})


def _text(value: bytes) -> bytes:
    return b"T" + len(value).to_bytes(4, "little") + value  # BINSTRING, which Python 3 no longer writes


def _batch(pixels: npt.NDArray[np.uint8], labels: list[int], key: str = "labels") -> bytes:
    """A file as Python 2 and numpy 1 wrote it: ``{"data": array, key: labels}``."""
    rows = len(pixels).to_bytes(4, "little")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + _text(b"b") + b"tR"
        b"(K\x01(J" + rows + b"M\x00\x0ct"  # version 1, shape (rows, 3072)
        b"cnumpy\ndtype\n("
        + _text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + _text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + _text(pixels.tobytes()) + b"tb"
    )
    listed = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"l"
    return b"\x80\x02(" + _text(b"data") + array + _text(key.encode()) + listed + b"d."


def _meta(key: str, names: list[str]) -> bytes:
    return b"\x80\x02(" + _text(key.encode()) + b"(" + b"".join(_text(name.encode()) for name in names) + b"ld."


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def _archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def pixels() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (6, 20, 3072), dtype=np.uint8)


@pytest.fixture
def files(pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """CIFAR-10's files in small, with our own checksums in the place of the published ones."""
    made = {f"part{i}": _batch(pixels[i], [i] * 20) for i in range(6)} | {"meta": _meta("label_names", list("abcdefghij"))}
    checksums = [[name, _md5(content)] for name, content in made.items()]
    monkeypatch.setattr(CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", checksums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": checksums[6][1]})
    return made


def _write(files: dict[str, bytes], root: Path) -> None:
    (root / CIFAR10.base_folder).mkdir()
    for name, content in files.items():
        (root / CIFAR10.base_folder / name).write_bytes(content)


@pytest.mark.parametrize("unpacked", [True, False])
def test_the_published_files_or_their_archive(
    unpacked: bool, tmp_path: Path, files: dict[str, bytes], pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    if unpacked:
        _write(files, tmp_path)
    else:
        content = _archive({f"{CIFAR10.base_folder}/{name}": content for name, content in files.items()})
        (tmp_path / CIFAR10.filename).write_bytes(content)
        monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(content))
    arrays = datasets.READERS["cifar10"](_config("cifar10", root=str(tmp_path), train_size=90), print)
    assert arrays.train_x.shape == (90, 32, 32, 3)
    assert arrays.train_y.tolist() == [i for i in range(5) for _ in range(20)][:90]
    np.testing.assert_array_equal(arrays.test_x[0], pixels[5, 0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert (arrays.crop, arrays.flip, arrays.num_classes) == (4, True, 10)
    assert unpacked == (tmp_path / CIFAR10.base_folder).exists()  # an archive is read where it is
    if unpacked:
        theirs = CIFAR10(str(tmp_path), train=True, download=False)
        np.testing.assert_array_equal(arrays.train_x, theirs.data[:90])
        assert arrays.train_y.tolist() == theirs.targets[:90]


def test_cifar100_takes_the_fine_labels(tmp_path: Path, pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: _batch(pixels[i], [i + 90] * 20, "fine_labels") for i, name in enumerate(("train", "test"))}
    made["meta"] = _meta("fine_label_names", [str(i) for i in range(100)])
    (tmp_path / CIFAR100.base_folder).mkdir()
    for name, content in made.items():
        (tmp_path / CIFAR100.base_folder / name).write_bytes(content)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", _md5(made["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", _md5(made["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": _md5(made["meta"])})
    (train_x, train_y), (_, test_y), classes = cifar.load("cifar100", tmp_path)
    assert (len(train_x), set(train_y), set(test_y), classes) == (20, {90}, {91}, 100)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_files_say_where_to_get_them(name: str, tmp_path: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    with pytest.raises(ValueError, match=f"{folder}.* is missing; download https://www.cs.toronto.edu/~kriz/cifar-.*MD5"):
        data.load(_config(name, root=str(tmp_path)))


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("code in a file was run",))


def test_a_damaged_file_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write({name: pickle.dumps(_Bomb()) for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)}, tmp_path)
    (tmp_path / CIFAR10.base_folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(_Bomb()))
    monkeypatch.setattr(cifar, "_unpickled", lambda *_: pytest.fail("a file with a wrong checksum was unpickled"))
    with pytest.raises(ValueError, match=r"batches.meta is damaged \(its MD5 is not 5ff9c542aee3614f3951f8cda6e48888\)"):
        data.load(_config("cifar10", root=str(tmp_path)))


def _system(command: str) -> bytes:
    return b"cos\nsystem\n(" + _text(command.encode()) + b"tR."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Bomb()), r"part0 is not a file of CIFAR: it asks for .*Fail, which no CIFAR file needs"),
        (_system("touch /tmp/owned"), "part0 is not a file of CIFAR: it asks for os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "it asks for builtins.eval"),
        (b"cnumpy\nload\n(S'x'\ntR.", "it asks for numpy.load"),
        (b"\x80\x02]", "part0 is not a file of CIFAR"),
        (b"", "part0 is not a file of CIFAR"),
        (pickle.dumps({"labels": [1]}), "part0 is not a file of CIFAR: it has no data"),
        (pickle.dumps({"data": b"abc", "labels": [1]}), "its data must be 1 rows of 3072 bytes"),
        (pickle.dumps([1, 2]), "it has no data"),
    ],
)
def test_with_the_right_checksum_too_no_code_is_run(
    content: bytes, message: str, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if somebody had found a file with the published MD5."""
    _write(files | {"part0": content}, tmp_path)
    monkeypatch.setattr(CIFAR10, "train_list", [["part0", _md5(content)], *CIFAR10.train_list[1:]])
    with pytest.raises(ValueError, match=message):
        data.load(_config("cifar10", root=str(tmp_path)))


def test_archives_that_are_not_the_published_one(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(_archive({f"{CIFAR10.base_folder}/{name}": content for name, content in files.items()}))
    with pytest.raises(
        ValueError, match=r"cifar-10-python.tar.gz is damaged \(its MD5 is not c58f30108f718f92721af3b95e74349a\)"
    ):
        data.load(_config("cifar10", root=str(tmp_path)))
    # With the right checksum, but with the files elsewhere: nothing outside the folder is taken for one of them.
    archive.write_bytes(_archive({f"elsewhere/{name}": content for name, content in files.items()}))
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(archive.read_bytes()))
    with pytest.raises(ValueError, match="meta is missing"):
        data.load(_config("cifar10", root=str(tmp_path)))
    archive.write_bytes(b"no archive")
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(archive.read_bytes()))
    with pytest.raises(ValueError, match="is not a tar archive"):
        data.load(_config("cifar10", root=str(tmp_path)))
