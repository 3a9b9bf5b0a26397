"""The mini-batch of a run: of one size or, with ``--memory-budget``, doubled where the boundary has freed the memory for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from localsgd_ext import BatchGrowth, LocalizedLearning, ResizableBatchSampler
from localsgd_ext.batch_growth import PeakMemory, SavedMemory
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.processes import World

MIB = 2**20


class MiniBatch:
    """How many pictures the next mini-batch has, over all processes together.

    Args:
        local: what has the boundary; needed where the batch may grow.
        scheduler: of the learning rate, which may grow with the batch.
        example: a process's share of a first mini-batch; only its shape, layout and device matter.
        train_size: pictures of an epoch; the batch never gets larger.
        count_saved: count what a step saves on a GPU too, whose peaks would be those of whatever else lies there.
    """

    def __init__(
        self,
        config: RunConfig,
        local: LocalizedLearning | None,
        scheduler: LRScheduler,
        example: Tensor,
        train_size: int,
        world: World,
        *,
        count_saved: bool = False,
    ) -> None:
        self._processes = world.size
        # For its size, and the number of pictures of an epoch on a process: the data set draws its mini-batches itself.
        self._share = ResizableBatchSampler(range(train_size // world.size), config.batch_size // world.size, drop_last=True)
        self._peaks: PeakMemory | None = None
        self._growth: BatchGrowth | None = None
        self._stepped = False  # since the epoch began
        if config.memory_budget is None:
            return
        assert local is not None, config.method  # the configuration refuses others
        if example.device.type == "cuda" and not count_saved:
            self._peaks = PeakMemory(local, self._share)
        self._budget = config.memory_budget
        self._growth = BatchGrowth(
            local,
            self._share,
            memory_budget=config.memory_budget,
            lr_scaling=config.lr_scaling,
            schedulers=scheduler,
            max_batch_size=None if config.max_batch_size is None else max(1, config.max_batch_size // world.size),
            measure=self._peaks or SavedMemory(local, example),
        )

    @property
    def size(self) -> int:
        return self._share.batch_size * self._processes

    @property
    def grows(self) -> bool:
        """Whether it may."""
        return self._growth is not None

    @property
    def predicted_bytes(self) -> int | None:
        """What a step of twice the batch was predicted to take at the end of the epoch; ``None``: not asked for, or not known."""
        predicted = self._growth.predicted if self._growth is not None and self._stepped else float("nan")
        return round(predicted) if predicted == predicted else None  # NaN is not equal to itself

    def step(self) -> str | None:
        """End an epoch, after ``LocalizedLearning.step()``, under the run's autocast. Says what has grown, if anything has."""
        before, self._stepped = self.size, True
        if self._growth is None or not self._growth.step():
            return None
        return (
            f"batch {before} -> {self.size}: on each device a step is predicted to take {self._growth.predicted / MIB:.1f} MiB "
            f"of {self._budget / MIB:.1f} MiB"
        )

    def begin_epoch(self) -> None:
        """Forget the device's peaks of memory, and what was predicted."""
        self._stepped = False
        if self._peaks is not None:
            self._peaks.highest = 0

    def peak_device_bytes(self, device: torch.device) -> int | None:
        """Allocated on a GPU at most since the epoch began; ``None`` on a CPU."""
        if device.type != "cuda":
            return None
        present = torch.cuda.max_memory_allocated(device)  # since the last step, where the peak of every step is read
        return max(present, self._peaks.highest) if self._peaks is not None else present

    def state_dict(self) -> dict[str, Any] | None:
        """``None`` where it does not grow. Of the whole mini-batch: the run may go on with another number of processes."""
        return None if self._growth is None else self._growth.state_dict() | {"batch_size": self.size}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self._growth is not None and state is not None:
            self._growth.load_state_dict(state | {"batch_size": state["batch_size"] // self._processes})

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        if self._peaks is not None:
            self._peaks.remove()
