"""The batch of each device grows where a local prefix has freed the memory for it (paper, section 3.2 and figure 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, Sampler

from .learning import LocalizedLearning
from .step_memory import Measure, PeakMemory, SavedMemory, StepMemory, device_of

__all__ = ["BatchGrowth", "Measure", "PeakMemory", "ResizableBatchSampler", "SavedMemory", "StepMemory"]

FACTOR = 2
LR_SCALINGS: dict[str, Callable[[float], float]] = {"none": lambda factor: 1.0, "linear": float, "sqrt": math.sqrt}
STATE_FORMAT = 1


class ResizableBatchSampler(BatchSampler):
    """``torch.utils.data.BatchSampler`` whose :attr:`batch_size` may be changed at any time.

    ::

        batch_sampler = ResizableBatchSampler(DistributedSampler(dataset), batch_size=64)
        loader = DataLoader(dataset, batch_sampler=batch_sampler)

    A change holds from the next batch that is drawn, in the middle of an epoch too (workers of a loader draw ahead), and loses
    or repeats no sample. ``len()`` is that of an epoch of the present size.

    Args:
        sampler: yields indices; with several processes a ``DistributedSampler``, each then has batches of ``batch_size``.
        batch_size: at least 1.
        drop_last: leave out a last batch that is smaller.
    Raises:
        TypeError, ValueError: an argument that is not that.
    """

    def __init__(self, sampler: Sampler[int] | Iterable[int], batch_size: int, drop_last: bool = False) -> None:
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last must be a bool, got {drop_last!r}")
        super().__init__(sampler, _positive("batch_size", batch_size), drop_last)

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = _positive("batch_size", value)

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(self.sampler)
        while True:
            wanted = self.batch_size
            batch = list(islice(indices, wanted))
            if not batch or (self.drop_last and len(batch) < wanted):
                return
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The present size. Not the position in an epoch, nor the state of ``sampler``."""
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore :meth:`state_dict`."""
        self.batch_size = state["batch_size"]


class BatchGrowth:
    """Doubles the batch of every device when the memory that a moved boundary has freed allows it.

    ::

        batch_sampler = ResizableBatchSampler(DistributedSampler(dataset), batch_size=64)
        loader = DataLoader(dataset, batch_sampler=batch_sampler)
        growth = BatchGrowth(local, batch_sampler, memory_budget=10 * 2**30, lr_scaling="linear", schedulers=scheduler)
        for epoch in range(90):
            ...
            local.step(epoch_loss)
            growth.step()               # the batch of the next epoch
            scheduler.step()            # before or after it

    The batch ``b`` becomes ``2b`` where, for every kind of step at the present boundary and on every device::

        constant + activations * 2b / batch_size <= memory_budget

    with what ``measure`` found in steps of ``batch_size`` samples (:class:`StepMemory`). There are two kinds where
    ``LocalizedLearning`` refreshes, and the larger decides: a mini-batch that back-propagates through the whole network needs
    SGD's memory at every boundary. Only ``refresh=None``, the default, lets the batch grow as the boundary moves; with a
    refresh it grows only where SGD's could, from the start. It never shrinks again: a schedule that moves the boundary back
    needs room in the budget. With a ``ReplicatedModel`` all processes must call :meth:`step`, and take the same decision.

    Fewer, larger batches are fewer optimizer steps, so that the learning rate may want to grow with them. The optimizers'
    ``lr`` is multiplied, and ``initial_lr``, ``max_lr`` and ``min_lr`` of their groups and ``base_lrs`` of ``schedulers`` with it: what torch's
    schedulers compute afterwards, from the present rate or from the first, is that of a run that began with the larger one. (A constant
    ``eta_min`` or a user's own floor stays.) The local learning rate is the length of a normalised step, and stays.

    Args:
        local: with the optimizers; of the network, or of a ``ReplicatedModel``.
        batch_sampler: what the loader draws from.
        memory_budget: bytes that a step may take on this device.
        lr_scaling: what the learning rate is multiplied by when the batch doubles: ``"none"``: 1, ``"linear"``: 2,
            ``"sqrt"``: the root of 2, or a callable of the factor (2.0).
        schedulers: the learning-rate schedulers of those optimizers, one or several; ``()``: none whose base rates are to be scaled.
        max_batch_size: the batch never gets larger. Nor does it than the samples of an epoch on this device.
        measure: finds the memory of a step, see :data:`Measure`. ``None``: :class:`PeakMemory`, for networks on a CUDA device; on a
            CPU give ``SavedMemory(local, x)``.
    Raises:
        TypeError, ValueError: an argument that is not that; a learning rate to scale, with a scheduler in use, and ``schedulers``
            not given.
    """

    def __init__(
        self,
        local: LocalizedLearning,
        batch_sampler: ResizableBatchSampler,
        *,
        memory_budget: float,
        lr_scaling: str | Callable[[float], float] = "none",
        schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        max_batch_size: int | None = None,
        measure: Measure | None = None,
    ) -> None:
        if not isinstance(local, LocalizedLearning):
            raise TypeError(f"local must be a LocalizedLearning, got {type(local).__name__}")
        if not isinstance(batch_sampler, ResizableBatchSampler):
            raise TypeError(f"batch_sampler must be a ResizableBatchSampler, got {type(batch_sampler).__name__}")
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int | float):
            raise TypeError(f"memory_budget must be a number of bytes, got {memory_budget!r}")
        if not memory_budget > 0:  # so that NaN is refused
            raise ValueError(f"memory_budget must be above 0, got {memory_budget}")
        if not callable(lr_scaling) and lr_scaling not in LR_SCALINGS:
            raise ValueError(f"lr_scaling must be one of {', '.join(LR_SCALINGS)} or a callable, got {lr_scaling!r}")
        if max_batch_size is not None:
            _positive("max_batch_size", max_batch_size)
        if not (measure is None or callable(measure)):
            raise TypeError(f"measure must be callable or None, got {measure!r}")
        if measure is None and device_of(local).type != "cuda":
            raise ValueError(
                f"measure must be given for a network on {device_of(local)}, such as SavedMemory(local, x); got None"
            )
        scales = lr_scaling != "none"
        groups = [group for optimizer in local._optimizers for group in optimizer.param_groups]
        if scales and not groups:
            raise ValueError(f"lr_scaling must be 'none' where local has no optimizer, got {lr_scaling!r}")
        if scales and schedulers is None and any("initial_lr" in group for group in groups):
            raise ValueError("schedulers must be given where a scheduler sets the learning rate that is to be scaled, got None")
        self._local = local
        self._batch_sampler = batch_sampler
        self._budget = memory_budget
        self._scaling = lr_scaling if callable(lr_scaling) else LR_SCALINGS[lr_scaling]
        self._schedulers = _flattened(schedulers)
        self._max_batch_size = math.inf if max_batch_size is None else max_batch_size
        self._measure = PeakMemory(local, batch_sampler) if measure is None else measure
        self.growths = 0
        """How often the batch has doubled."""
        self.predicted = math.nan
        """Bytes predicted for the batch that was last thought of, the most of all processes; NaN: not known, or not asked for."""

    @property
    def batch_size(self) -> int:
        """The present batch of each device."""
        return self._batch_sampler.batch_size

    def step(self) -> bool:
        """End an epoch, after ``local.step()``: double the batch if that is predicted to fit.

        Returns:
            Whether it has grown.
        Raises:
            RuntimeError: processes have batches of different sizes.
            ValueError: the callable ``lr_scaling`` gave no finite number above 0.
        """
        size = FACTOR * self.batch_size
        sampler = self._batch_sampler.sampler
        samples = len(sampler) if isinstance(sampler, Sized) else math.inf
        # A process that already knows that it cannot still takes part, below: the others wait for it.
        predicted = self._predict(size) if size <= min(self._max_batch_size, samples) else math.nan
        fits = predicted <= self._budget  # NaN does not
        if self._local.replicas is not None:
            everyone = self._local.replicas.gather([predicted, fits, size])
            all_predicted, all_fit, sizes = zip(*everyone, strict=True)
            if len(set(sizes)) > 1:
                raise RuntimeError(
                    f"batch_size must be the same on all processes, got {', '.join(str(int(s) // FACTOR) for s in sizes)}"
                )
            predicted = math.nan if any(map(math.isnan, all_predicted)) else max(all_predicted)
            fits = all(all_fit)
        self.predicted = predicted
        if fits:
            self._scale_lr(self._scaling(float(FACTOR)))
            self._batch_sampler.batch_size = size
            self.growths += 1
        return fits

    def state_dict(self) -> dict[str, Any]:
        """What to resume from, for ``torch.load(weights_only=True)``; the scaled rates are in the states of optimizers and schedulers."""
        state = {"format": STATE_FORMAT, "batch_size": self.batch_size, "growths": self.growths}
        return state | {"peaks": self._measure.state_dict()} if isinstance(self._measure, PeakMemory) else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, the sampler's batch included. Leaves learning rates alone: load optimizers and schedulers too.

        Raises:
            ValueError: the state has another format.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"state must have format {STATE_FORMAT}, got {state.get('format')!r}")
        self._batch_sampler.batch_size = state["batch_size"]
        self.growths = state["growths"]
        if isinstance(self._measure, PeakMemory) and "peaks" in state:  # not in states of a CPU
            self._measure.load_state_dict(state["peaks"])
        self.predicted = math.nan

    def _predict(self, batch_size: int) -> float:
        """Bytes of the largest kind of step at the present boundary, with ``batch_size`` samples; NaN: not known."""
        local = self._local
        stops = local.boundary > 0
        kinds = [True] * (not stops or local._refresher is not None) + [False] * stops
        found = [self._measure(whole) for whole in kinds]
        known = [each.at(batch_size) for each in found if each is not None]
        return max(known) if len(known) == len(found) else math.nan

    def _scale_lr(self, factor: float) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"lr_scaling must return a finite number above 0, got {factor!r}")
        if factor == 1:
            return
        for optimizer in self._local._optimizers:
            for group in optimizer.param_groups:
                for key in ("initial_lr", "max_lr", "min_lr"):
                    if key in group:
                        group[key] = group[key] * factor
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(factor)  # a graph or compiled step may read this very tensor
                else:
                    group["lr"] = group["lr"] * factor
        for scheduler in self._schedulers:
            for name in ("base_lrs", "max_lrs"):
                if hasattr(scheduler, name):
                    setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
            scheduler._last_lr = _rates(scheduler.optimizer)


def _rates(optimizer: Optimizer) -> list[float | Tensor]:
    rates = (group["lr"] for group in optimizer.param_groups)
    return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]


def _flattened(schedulers: object) -> list[LRScheduler]:
    """The schedulers, and those inside of ``SequentialLR`` and ``ChainedScheduler``, once each."""
    if schedulers is None:
        return []
    given: list[Any] = list(schedulers) if isinstance(schedulers, Iterable) else [schedulers]
    for each in given:
        if not isinstance(each, LRScheduler):
            raise TypeError(f"schedulers must be torch.optim.lr_scheduler.LRScheduler, got {type(each).__name__}")
    inner = [_flattened(getattr(each, "_schedulers", ())) for each in given]
    return list(dict.fromkeys([*given, *(one for some in inner for one in some)]))


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
