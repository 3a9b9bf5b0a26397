from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from localsgd_ext.train import data, datasets
from localsgd_ext.train.config import RunConfig, resolve


def _config(name: str, **flags: Any) -> RunConfig:
    return resolve(name, "small_resnet", "sgd", **{"device": "cpu", "batch_size": 16, **flags})


def _epoch(loaded: data.Data, epoch: int) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loaded.train(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("name", ["digits", "fake", "glyphs"])
def test_an_epoch_follows_from_seed_and_epoch_alone(name: str) -> None:
    config = _config(name, train_size=100, test_size=20)
    first = _epoch(data.load(config), 3)
    again = data.load(config)
    for epoch in range(3):
        _epoch(again, epoch)
    torch.manual_seed(99)
    second = _epoch(again, 3)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], _epoch(again, 4)[1])
    assert not torch.equal(first[1], _epoch(data.load(config.replace(seed=1)), 3)[1])


def _numbered(**changes: Any) -> datasets.Arrays:
    """40 pictures of 6x6; picture ``i`` has the label ``i`` and no pixel in common with its mirror image."""
    images = np.random.default_rng(0).integers(1, 256, (40, 6, 6, 3)).astype(np.uint8)
    labels = np.arange(40)
    return datasets.Arrays(images, labels, images[:10], labels[:10], num_classes=40, **changes)


def test_every_picture_comes_once_and_an_incomplete_batch_not_at_all() -> None:
    loaded = data.InMemory(_numbered(), _config("fake", batch_size=8))
    assert loaded.steps == 5
    assert sorted(_epoch(loaded, 0)[1].tolist()) == list(range(40))
    assert data.InMemory(_numbered(), _config("fake", batch_size=16)).steps == 2
    assert [len(y) for _, y in data.InMemory(_numbered(), _config("fake", batch_size=16)).train(0)] == [16, 16]


def test_crops_and_mirror_images_are_of_the_right_picture() -> None:
    source = _numbered(crop=2, flip=True)
    loaded = data.InMemory(source, _config("fake", batch_size=40))
    padded = np.pad(source.train_x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    ((images, labels),) = loaded.train(0)
    pixels = (images * (1 / loaded._scale) + loaded._mean).round().byte().permute(0, 2, 3, 1).numpy()
    seen = set()
    for picture, label in zip(pixels, labels.tolist(), strict=True):
        matches = [
            (row, column, flipped)
            for row in range(5)
            for column in range(5)
            for flipped in (False, True)
            if (padded[label, row : row + 6, column : column + 6][:, :: -1 if flipped else 1] == picture).all()
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len({(row, column) for row, column, _ in seen}) > 10
    assert {flipped for *_, flipped in seen} == {False, True}


def test_normalised_by_the_training_sets_statistics() -> None:
    loaded = data.InMemory(_numbered(), _config("fake", batch_size=40))
    ((images, _),) = loaded.train(0)
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(dim=(0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


def test_channels_last() -> None:
    loaded = data.InMemory(_numbered(crop=1), _config("fake", batch_size=8, channels_last=True))
    for images, _ in (*loaded.train(0), *loaded.test()):
        assert images.is_contiguous(memory_format=torch.channels_last)
    plain = data.InMemory(_numbered(crop=1), _config("fake", batch_size=8))
    assert torch.equal(_epoch(plain, 0)[0], _epoch(loaded, 0)[0])


def test_digits_are_scans_split_without_overlap() -> None:
    arrays = datasets.READERS["digits"](_config("digits"), print)
    assert (arrays.train_x.shape, arrays.test_x.shape) == ((1437, 16, 16, 3), (360, 16, 16, 3))
    assert not {x.tobytes() for x in arrays.train_x} & {x.tobytes() for x in arrays.test_x}
    assert np.bincount(arrays.test_y).min() >= 20
    assert datasets.READERS["digits"](_config("digits", image_size=32), print).train_x.shape == (1437, 32, 32, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"name": "digits", "train_size": 1438}, "--train-size must be at most 1437 for digits, got 1438"),
        ({"name": "fake", "train_size": 8}, "--batch-size 16 is more than the 8 training pictures"),
        ({"name": "glyphs", "image_size": 64}, "--image-size applies to digits, fake and imagenet; glyphs is 32x32, got 64"),
        ({"name": "cifar10"}, "--data cifar10 needs --root, .*https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ({"name": "imagenet"}, "--data imagenet needs --root; .*https://image-net.org/download.php"),
    ],
)
def test_wrong_options(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(_config(flags.pop("name"), **flags))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_files_say_where_to_get_them(name: str, tmp_path: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    with pytest.raises(ValueError, match=f"{folder}.* is missing; .*https://www.cs.toronto.edu/~kriz/cifar-.*tar -xzf"):
        data.load(_config(name, root=str(tmp_path)))


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("the pickle was opened",))


def test_a_damaged_cifar_file_is_never_opened(tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        (folder / name).write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"data_batch_1 is damaged \(its MD5 is not c99cafc152244af753f735de768cd75f\)"):
        data.load(_config("cifar10", root=str(tmp_path)))


def test_cifar_through_torchvisions_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the right form, with our own checksums in the place of the real ones."""
    import hashlib

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 20, 3072), dtype=np.uint8)

    def write(name: str, content: Any) -> tuple[str, str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return name, hashlib.md5(raw).hexdigest()

    files = [write(f"part{i}", {"data": pixels[i], "labels": [i] * 20}) for i in range(6)]
    meta = write("meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", [list(f) for f in files[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [list(files[5])])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": meta[1]})
    arrays = datasets.READERS["cifar10"](_config("cifar10", root=str(tmp_path), train_size=90), print)
    assert arrays.train_x.shape == (90, 32, 32, 3)
    assert arrays.train_y.tolist() == [i for i in range(5) for _ in range(20)][:90]
    np.testing.assert_array_equal(arrays.test_x[0], pixels[5, 0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert (arrays.crop, arrays.flip, arrays.num_classes) == (4, True, 10)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                picture.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_imagenet_order_and_augmentation_do_not_depend_on_workers(folders: Path) -> None:
    config = resolve("imagenet", "resnet50", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=0)
    alone, helped = data.load(config), data.load(config.replace(workers=1))
    assert (alone.num_classes, alone.train_size, alone.test_size, alone.steps) == (2, 12, 6, 3)
    before = torch.get_rng_state()
    first = _epoch(alone, 1)
    assert torch.equal(before, torch.get_rng_state())
    second = _epoch(helped, 1)
    assert first[0].shape == (12, 3, 32, 32)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], _epoch(alone, 2)[0])
    assert [y.tolist() for _, y in alone.test()] == [[0, 0, 0, 1], [1, 1]]


def test_imagenet_subset_and_missing_folders(folders: Path) -> None:
    config = resolve("imagenet", "resnet50", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=0)
    assert data.load(config.replace(train_size=5, test_size=2)).train_size == 5
    with pytest.raises(ValueError, match="--train-size must be at most 12 for this folder, got 13"):
        data.load(config.replace(train_size=13))
    (folders / "val" / "n01443537").rename(folders / "val" / "odd")
    with pytest.raises(ValueError, match="must hold the same classes; only one has n01443537, odd"):
        data.load(config)
    (folders / "val").rename(folders / "validation")
    with pytest.raises(ValueError, match=r"val is missing; get ILSVRC2012_img_train.tar .*https://image-net.org/download.php"):
        data.load(config)
