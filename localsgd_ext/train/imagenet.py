"""ImageNet, or any two folders laid out like it, through torchvision's reader and worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.data import Batch, derive_seed
from localsgd_ext.train.processes import ALONE, World

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WHERE = (
    "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download.php (registration needed) and "
    "unpack them, one folder per class, as {root}/train/n01440764/*.JPEG and {root}/val/n01440764/*.JPEG; "
    "torchvision.datasets.ImageNet({root!r}, split='train'), then split='val', does that beside the tar files"
)


class ImageFolders:
    """``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``. Raises ``ValueError`` that says what is missing and where it is."""

    def __init__(self, config: RunConfig, world: World = ALONE) -> None:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        if config.root is None:
            raise ValueError(f"--data imagenet needs --root; {_WHERE.format(root='ROOT')}")
        folders = [Path(config.root) / split for split in ("train", "val")]
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing; {_WHERE.format(root=config.root)}")
        self.image_size = size = config.image_size or 224
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
        augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *to_tensor])
        centre = v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), *to_tensor])
        train, test = (ImageFolder(str(f), transform) for f, transform in zip(folders, (augment, centre), strict=True))
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"{folders[0]} and {folders[1]} must hold the same classes; only one has {', '.join(odd[:5])}")
        self.num_classes = len(train.classes)
        self._train, self._test = _Seeded(train), test
        self._train_index = _subset(len(train), config.train_size, "train")
        self._test_index = _subset(len(test), config.test_size, "test")
        self.train_size, self.test_size = len(self._train_index), len(self._test_index)
        self._config, self._world = config, world

    @property
    def steps(self) -> int:
        return self.train_size // self._config.batch_size

    def train(self, epoch: int) -> Iterator[Batch]:
        random = np.random.default_rng(derive_seed(self._config.seed, epoch))
        order = random.permutation(self._train_index)[: self.steps * self._config.batch_size]
        seeds = random.integers(2**63, size=len(order))
        keys = list(zip(order.tolist(), seeds.tolist(), strict=True))
        share, size = self._world.share(self._config.batch_size), self._config.batch_size
        mine = [key for start in range(0, len(keys), size) for key in keys[start : start + size][share]]
        yield from self._load(self._train, mine, share.stop - share.start)

    def test(self) -> Iterator[Batch]:
        yield from self._load(
            self._test, self._test_index.tolist()[self._world.rank :: self._world.size], self._config.batch_size
        )

    def _load(self, dataset: Any, keys: list[Any], batch_size: int) -> Iterator[Batch]:
        config, device = self._config, torch.device(self._config.device)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=keys,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # or the loader would draw from the global one
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        for images, labels in loader:
            yield images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)


class _Seeded(Dataset[Any]):
    """Augments each picture from a seed of its own, so that the number of workers changes nothing."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            item: tuple[Tensor, int] = self.dataset[index]
            return item


def _subset(there: int, size: int | None, split: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``size`` pictures spread over all classes: the folders list them class by class."""
    if size is not None and size > there:
        raise ValueError(f"--{split}-size must be at most {there} for this folder, got {size}")
    index = np.arange(there)
    return index if size is None else np.sort(np.random.default_rng(0).permutation(index)[:size])
