"""Data sets as seeded streams of mini-batches: what comes in epoch ``e`` follows from ``(seed, e)`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from localsgd_ext.train import datasets
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.processes import ALONE, World

Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W] float32, labels [B] int64, both on the run's device


class UnreadablePictures(RuntimeError):
    """Pictures that cannot be decoded, where the run is not to go on without them."""


class Data(Protocol):
    """A training and a test set, in mini-batches."""

    num_classes: int
    train_size: int
    test_size: int
    image_size: int
    unreadable: dict[str, str]
    """Pictures that could not be decoded and were left out, with the reason; the caller clears it."""
    repeated: int
    """How often a share of a mini-batch was given once more, in the place of one without a readable picture; the caller clears it."""

    @property
    def steps(self) -> int:
        """Mini-batches of ``--batch-size`` per training epoch; an incomplete last one is left out, so that all steps cost the same."""

    def train(self, epoch: int, batch_size: int | None = None) -> Iterator[Batch]:
        """The training set in the order of this epoch, augmented; of every mini-batch, this process's share.

        The order and the augmentation do not depend on ``batch_size``, of a whole mini-batch; ``None``: ``--batch-size``.
        """

    def test(self) -> Iterator[Batch]:
        """The test set in its own order; of several processes each has mini-batches of its own."""


def derive_seed(*parts: int) -> int:
    """A 63-bit seed for an independent random stream named by ``parts``."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def load(config: RunConfig, log: Callable[[str], None] = lambda _: None, world: World = ALONE) -> Data:
    """The run's data set, in mini-batches whose order does not depend on the number of processes.

    Raises:
        ValueError: files are missing (it says where to get them), or mini-batches cannot be shared out evenly.
    """
    if config.batch_size % world.size:
        raise ValueError(
            f"--batch-size must be a multiple of the number of processes, which share it: got {config.batch_size} for {world.size}"
        )
    if config.data == "imagenet":
        from localsgd_ext.train.imagenet import ImageFolders

        data: Data = ImageFolders(config, world)
    else:
        data = InMemory(datasets.READERS[config.data](config, log), config, world)
    if data.train_size < config.batch_size:
        raise ValueError(f"--batch-size {config.batch_size} is more than the {data.train_size} training pictures")
    return data


class InMemory:
    """A set small enough to lie on the device as bytes; a mini-batch is one indexing operation."""

    def __init__(self, source: datasets.Arrays, config: RunConfig, world: World = ALONE) -> None:
        device = torch.device(config.device)
        self.num_classes = source.num_classes
        self.train_size, self.test_size = len(source.train_y), len(source.test_y)
        self.image_size = source.train_x.shape[1]
        self.unreadable: dict[str, str] = {}
        self.repeated = 0
        self._batch_size, self._seed, self._world = config.batch_size, config.seed, world
        self._crop, self._flip = source.crop, source.flip
        self._format = torch.channels_last if config.channels_last else torch.contiguous_format

        images = torch.from_numpy(source.train_x).permute(0, 3, 1, 2)  # [N, 3, H, W] bytes
        mean, std = _channel_statistics(source.train_x)
        self._mean, self._scale = mean.to(device), (1 / (255 * std)).to(device)
        padded = F.pad(images, (self._crop,) * 4).contiguous().to(device)
        # Every crop of every picture is a view: [N, 2p + 1, 2p + 1, 3, H, W], no copy.
        self._crops = padded.unfold(2, self.image_size, 1).unfold(3, self.image_size, 1).permute(0, 2, 3, 1, 4, 5)
        self._train_y = torch.from_numpy(source.train_y).to(device)
        self._test_x = torch.from_numpy(source.test_x).permute(0, 3, 1, 2).contiguous().to(device)
        self._test_y = torch.from_numpy(source.test_y).to(device)

    @property
    def steps(self) -> int:
        return self.train_size // self._batch_size

    def train(self, epoch: int, batch_size: int | None = None) -> Iterator[Batch]:
        size = batch_size or self._batch_size
        random = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
        device, n = self._train_y.device, self.train_size
        order = torch.randperm(n, generator=random).to(device)
        offsets = torch.randint(0, 2 * self._crop + 1, (2, n), generator=random).to(device)
        flips = torch.randint(0, 2, (n, 1, 1, 1), generator=random).bool().to(device)
        for start in range(0, n - n % size, size):
            index = order[start : start + size][self._world.share(size)]
            images = self._crops[index, offsets[0, index], offsets[1, index]]
            if self._flip:
                images = torch.where(flips[index], images.flip(3), images)
            yield self._normalise(images), self._train_y[index]

    def test(self) -> Iterator[Batch]:
        for start in range(250 * self._world.rank, self.test_size, 250 * self._world.size):
            yield self._normalise(self._test_x[start : start + 250]), self._test_y[start : start + 250]

    def _normalise(self, images: Tensor) -> Tensor:
        return ((images - self._mean) * self._scale).contiguous(memory_format=self._format)


def _channel_statistics(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> tuple[Tensor, Tensor]:
    """Mean (0 to 255) and standard deviation (0 to 1) of each channel ``[3, 1, 1]``, from exact integer sums."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    levels, total = np.arange(256), counts[0].sum()
    mean = (counts * levels).sum(axis=1) / total
    std = np.sqrt(np.maximum((counts * levels**2).sum(axis=1) / total - mean**2, 1e-6)) / 255
    as_column = [torch.from_numpy(v).float()[:, None, None] for v in (mean, std)]
    return as_column[0], as_column[1]
