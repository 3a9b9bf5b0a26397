from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from localsgd_ext.train import data, datasets
from localsgd_ext.train.config import RunConfig, resolve
from localsgd_ext.train.loop import Trainer


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


def test_a_larger_mini_batch_is_the_next_ones_together() -> None:
    """The batch may grow in mid-run: the order and the augmentation of an epoch stay."""
    loaded = data.InMemory(_numbered(crop=2, flip=True), _config("fake", batch_size=8))
    small, large = list(loaded.train(1)), list(loaded.train(1, 16))
    assert [len(y) for _, y in large] == [16, 16]
    for i in (0, 1):
        assert torch.equal(torch.cat([batch[i] for batch in small[:4]]), torch.cat([batch[i] for batch in large]))


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
        ({"name": "cifar10"}, "--data cifar10 needs --root; .*https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ({"name": "imagenet"}, "--data imagenet needs --root; .*https://image-net.org/download.php"),
    ],
)
def test_wrong_options(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(_config(flags.pop("name"), **flags))


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


def _damage(folders: Path) -> dict[Path, str]:
    """Four pictures are spoilt, each in another way: file -> what is said about it."""
    paths = [folders / "train" / "n01440764" / f"{i}.png" for i in (0, 3)]
    paths += [folders / "train" / "n01443537" / "5.png", folders / "val" / "n01443537" / "1.png"]
    whole = paths[1].read_bytes()
    paths[0].write_bytes(b"no picture at all")
    paths[1].write_bytes(whole[: len(whole) // 2])
    header = bytearray(whole)
    header[16:24] = b"\x00\x01\x00\x00\x00\x01\x00\x00"  # 65536 x 65536 pixels: refused, not decoded
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    paths[2].write_bytes(bytes(header))
    paths[3].write_bytes(b"")
    reasons = ("cannot identify image file", "truncated", "DecompressionBombError", "cannot identify image file")
    return dict(zip(paths, reasons, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_left_out_by_name(workers: int, folders: Path) -> None:
    config = resolve(
        "imagenet", "resnet50", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=workers
    )
    whole = _epoch(data.load(config), 0)
    damaged = _damage(folders)
    loaded = data.load(config)
    images, labels = _epoch(loaded, 0)
    assert len(labels) == len(images) == 9
    assert {image.numpy().tobytes() for image in images} < {image.numpy().tobytes() for image in whole[0]}
    assert loaded.unreadable.keys() == {str(path) for path in damaged if "train" in path.parts}
    assert [y.tolist() for _, y in loaded.test()] == [[0, 0, 0, 1], [1]]
    assert loaded.unreadable.keys() == {str(path) for path in damaged}
    for path, why in damaged.items():
        assert why in loaded.unreadable[str(path)]
    with pytest.raises(data.UnreadablePictures, match=r"train/.*/\d.png cannot be read: .*; --bad-images report leaves"):
        _epoch(data.load(config.replace(bad_images="raise")), 0)


def test_a_set_without_one_good_picture_and_a_class_without_pictures(folders: Path) -> None:
    config = resolve("imagenet", "resnet50", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=0)
    for path in folders.glob("val/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(data.UnreadablePictures, match=r"none of the 6 pictures can be read; .*0.png: "):
        list(data.load(config).test())
    for path in folders.glob("val/n01443537/*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no valid file for the classes n01443537"):
        data.load(config)


def test_a_file_that_vanishes_is_no_damaged_picture(folders: Path) -> None:
    config = resolve("imagenet", "resnet50", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=0)
    loaded = data.load(config)
    (folders / "val" / "n01443537" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        list(loaded.test())


def test_a_run_counts_damaged_pictures_and_names_them(
    folders: Path, tmp_path: Path, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = _damage(folders)
    config = resolve(
        "imagenet", "small_resnet", "sgd", device="cpu", root=str(folders), image_size=32, batch_size=4, workers=0, epochs=2
    )
    run = trainer(config)
    while not run.done:
        run.run_epoch()
    assert [entry["unreadable_images"] for entry in run.metrics] == [4, 4]
    assert all(0 <= entry["test_accuracy"] <= 1 and entry["test_accuracy"] * 5 % 1 == 0 for entry in run.metrics)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("4 pictures could not be read and were left out: ") == 2
    assert all(str(path) in log for path in damaged)
