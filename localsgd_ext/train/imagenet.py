"""ImageNet, or any two folders laid out like it, through torchvision's reader and worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.data import Batch, UnreadablePictures, derive_seed
from localsgd_ext.train.processes import ALONE, World

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WHERE = (
    "get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download.php (registration needed) and "
    "unpack them, one folder per class, as {root}/train/n01440764/*.JPEG and {root}/val/n01440764/*.JPEG; "
    "torchvision.datasets.ImageNet({root!r}, split='train'), then split='val', does that beside the tar files"
)


class ImageFolders:
    """``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``. Raises ``ValueError`` that says what is missing and where it is.

    A picture that cannot be decoded is left out of its mini-batch and noted in :attr:`unreadable`, or, with ``--bad-images
    raise``, ends the run. A mini-batch without a readable picture is left out. Of several processes all must make the same number
    of steps: where a process's share of a mini-batch has no readable picture, it takes its share of the mini-batch before once
    more (of the first one after, at the beginning of an epoch). Those pictures count twice in the epoch, and nothing else
    changes: the order is random, so that they are as good a sample as those that are missing. Gradients are averaged over shares,
    so that the others of a share that has lost some count for a little more.
    """

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
        try:
            train, test = (ImageFolder(str(f), loader=_decode) for f in folders)
        except FileNotFoundError as error:  # a class without pictures
            raise ValueError(str(error)) from None
        if train.classes != test.classes:
            odd = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"{folders[0]} and {folders[1]} must hold the same classes; only one has {', '.join(odd[:5])}")
        self.num_classes = len(train.classes)
        self._train, self._test = _Pictures(train, augment), _Pictures(test, centre)
        self.unreadable: dict[str, str] = {}
        self.repeated = 0
        self._train_index = _subset(len(train), config.train_size, "train")
        self._test_index = _subset(len(test), config.test_size, "test")
        self.train_size, self.test_size = len(self._train_index), len(self._test_index)
        self._config, self._world = config, world

    @property
    def steps(self) -> int:
        return self.train_size // self._config.batch_size

    def train(self, epoch: int, batch_size: int | None = None) -> Iterator[Batch]:
        size = batch_size or self._config.batch_size
        random = np.random.default_rng(derive_seed(self._config.seed, epoch))
        order = random.permutation(self._train_index)
        seeds = random.integers(2**63, size=len(order))
        keys = list(zip(order.tolist(), seeds.tolist(), strict=True))[: len(order) - len(order) % size]
        share = self._world.share(size)
        mine = [key for start in range(0, len(keys), size) for key in keys[start : start + size][share]]
        batches = self._load(self._train, mine, share.stop - share.start)
        if self._world.size == 1:
            yield from (batch for batch in batches if batch is not None)
        else:
            yield from self._repeating(batches)

    def test(self) -> Iterator[Batch]:
        mine = self._test_index.tolist()[self._world.rank :: self._world.size]
        batches = self._load(self._test, [(index, 0) for index in mine], self._config.batch_size)
        yield from (batch for batch in batches if batch is not None)

    def _repeating(self, batches: Iterator[Batch | None]) -> Iterator[Batch]:
        """A batch in the place of each, if there is one at all."""
        last: Batch | None = None
        due = 0
        for batch in batches:
            if batch is None:
                self.repeated += 1
            due += 1
            last = batch or last
            if last is not None:
                yield from itertools.repeat(last, due)
                due = 0

    def _load(self, dataset: Any, keys: list[Any], batch_size: int) -> Iterator[Batch | None]:
        """The pictures of ``keys`` in batches; ``None`` in the place of one without a readable picture."""
        if not keys:  # fewer test pictures than processes
            return
        config, device = self._config, torch.device(self._config.device)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=keys,
            num_workers=config.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),  # or the loader would draw from the global one
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        any_good = False
        for images, labels, bad in loader:
            self.unreadable.update(bad)
            if bad and config.bad_images == "raise":
                path, why = bad[0]
                raise UnreadablePictures(f"{path} cannot be read: {why}; --bad-images report leaves such pictures out")
            if images is None:
                yield None
                continue
            any_good = True
            yield images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)
        if not any_good and (dataset is self._train or self._world.size == 1):  # of test pictures others may have good ones
            path, why = next(iter(self.unreadable.items()))
            whose = "" if self._world.size == 1 else f" of the share of {self._world.of([self._world.rank])}"
            raise UnreadablePictures(f"none of the {len(keys)} pictures{whose} can be read; {path}: {why}")


@dataclass(frozen=True)
class _Bad:
    """In the place of a picture that cannot be decoded."""

    why: str


def _decode(path: str) -> Any:
    """The picture in a file, or why there is none. The system's own errors (missing file, failing disk, memory) are raised."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises whatever a damaged file ends in; one that is too large is refused by it, too
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        return _Bad(f"{type(error).__name__}: {error}".replace(repr(path), "the file"))


def _collate(items: list[tuple[Tensor | _Bad, int, str]]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]]]:
    """Images ``[B, 3, H, W]`` (``None`` if all are bad) and labels ``[B]`` of the good pictures, paths and reasons of the others."""
    good = [(image, label) for image, label, _ in items if isinstance(image, Tensor)]
    bad = [(path, image.why) for image, _, path in items if isinstance(image, _Bad)]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), bad


class _Pictures(Dataset[Any]):
    """Transforms each picture from a seed of its own, so that the number of workers changes nothing."""

    def __init__(self, folder: Any, transform: Callable[[Any], Tensor]) -> None:
        self._folder, self._transform = folder, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | _Bad, int, str]:
        index, seed = key
        picture, label = self._folder[index]
        path: str = self._folder.samples[index][0]
        if isinstance(picture, _Bad):
            return picture, label, path
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._transform(picture), label, path


def _subset(there: int, size: int | None, split: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """``size`` pictures spread over all classes: the folders list them class by class."""
    if size is not None and size > there:
        raise ValueError(f"--{split}-size must be at most {there} for this folder, got {size}")
    index = np.arange(there)
    return index if size is None else np.sort(np.random.default_rng(0).permutation(index)[:size])
