"""Epochs that start from what the frozen prefix put out in an earlier one: it would put out the same again for the same pictures.

What such an epoch saves is the prefix's forward pass; what it costs is that no picture is augmented anew, and memory for the outputs. Layers
that have entered the prefix since run on them. BatchNorm's running statistics in the skipped modules stand still.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Outputs:
    """Of the first modules of ``model``, one for each picture of an epoch, and the labels."""

    def __init__(self, model: nn.Sequential) -> None:
        self._model = model
        self._modules = 0  # whose outputs are kept
        self._left = 0  # epochs that may start from them
        self._kept: list[Batch] = []

    def begin_epoch(self, modules: int, replays: int) -> int:
        """How many modules the epoch skips, at most the first ``modules``, which must not learn; 0: it keeps their outputs, for
        ``replays`` further ones."""
        if self._kept and self._left and modules >= self._modules:
            self._left -= 1
            return self._modules
        self._modules, self._left, self._kept = modules, replays, []
        return 0

    def keep(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, after each of which the output of the first modules is kept: the model must have run on it."""
        if not self._modules:
            yield from batches
            return
        outputs: list[Tensor] = []
        hook = self._model[self._modules - 1].register_forward_hook(lambda _, args, output: outputs.append(output.detach()))
        try:
            for x, y in batches:
                yield x, y
                self._kept.append((outputs.pop(), y))
        finally:
            hook.remove()

    def batches(self, random: Random) -> Iterator[Batch]:
        """Mini-batches of the kept outputs in another order, as large as the first one was."""
        z, y = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(random.randrange(2**32)))
        for index in order.split(len(self._kept[0][1])):
            yield z[index], y[index]
