"""Readers of the data sets that fit in memory. Nothing is downloaded: a missing file says where to get it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from localsgd_ext.train import cifar, glyphs
from localsgd_ext.train.config import RunConfig

Log = Callable[[str], None]


@dataclass(frozen=True)
class Arrays:
    """Pictures as bytes ``[N, H, W, 3]``, labels ``[N]``, and how training pictures are augmented."""

    train_x: npt.NDArray[np.uint8]
    train_y: npt.NDArray[np.int64]
    test_x: npt.NDArray[np.uint8]
    test_y: npt.NDArray[np.int64]
    num_classes: int
    crop: int = 0  # pixels of zero padding before a random crop
    flip: bool = False  # mirror every other picture; never for letters and digits

    def limited(self, config: RunConfig) -> Arrays:
        """The first ``--train-size`` and ``--test-size`` pictures."""
        for flag, size, there in (("train", config.train_size, self.train_y), ("test", config.test_size, self.test_y)):
            if size is not None and size > len(there):
                raise ValueError(f"--{flag}-size must be at most {len(there)} for {config.data}, got {size}")
        n, m = config.train_size, config.test_size
        arrays = (self.train_x[:n], self.train_y[:n], self.test_x[:m], self.test_y[:m])
        return Arrays(*arrays, num_classes=self.num_classes, crop=self.crop, flip=self.flip)


def _glyphs(config: RunConfig, log: Log) -> Arrays:
    _reject_image_size(config)
    arrays = glyphs.load(config.train_size or 6000, config.test_size or 2000, seed=0, log=log)
    return Arrays(*arrays, num_classes=26, crop=2)


def _digits(config: RunConfig, log: Log) -> Arrays:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # 1797 scans of 8x8, levels 0 to 16
    size = config.image_size or 16
    scans = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) * (255 / 16)
    scans = F.interpolate(scans, size=(size, size), mode="bilinear", align_corners=False)
    pictures = scans.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    labels = labels.astype(np.int64)
    return Arrays(pictures[train], labels[train], pictures[test], labels[test], num_classes=10, crop=size // 8).limited(config)


def _fake(config: RunConfig, log: Log) -> Arrays:
    """Noise around one random picture per class: for trying things out, and as fast as data can come."""
    size, classes = config.image_size or 32, 10
    rng = np.random.default_rng(0)
    centres = rng.integers(64, 192, (classes, size, size, 3))

    def draw(count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        labels = rng.integers(classes, size=count)
        noise = rng.integers(-64, 64, (count, size, size, 3), dtype=np.int16)
        return (centres[labels] + noise).astype(np.uint8), labels

    return Arrays(*draw(config.train_size or 2048), *draw(config.test_size or 512), num_classes=classes)


def _cifar(config: RunConfig, log: Log) -> Arrays:
    _reject_image_size(config)
    if config.root is None:
        raise ValueError(f"--data {config.data} needs --root; {cifar.where(config.data, Path('ROOT'))}")
    train, test, classes = cifar.load(config.data, Path(config.root))
    return Arrays(*train, *test, num_classes=classes, crop=4, flip=True).limited(config)


def _reject_image_size(config: RunConfig) -> None:
    if config.image_size not in (None, 32):
        raise ValueError(f"--image-size applies to digits, fake and imagenet; {config.data} is 32x32, got {config.image_size}")


READERS: dict[str, Callable[[RunConfig, Log], Arrays]] = {
    "glyphs": _glyphs,
    "digits": _digits,
    "fake": _fake,
    "cifar10": _cifar,
    "cifar100": _cifar,
}
