"""Refresh: now and then a mini-batch back-propagates through the local prefix too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from torch.optim import Optimizer

from .freezing import PrefixFreeze
from .nonfinite import leaves_out
from .updater import HebbianUpdater

Every = int | Callable[[int], int]


class Refresh:
    """Which mini-batches back-propagate through the whole network: one in every ``every``, and in between none.

    Args:
        every: mini-batches from one refresh to the next, at least 1 (1: all of them), or a callable of the epoch.
    Raises:
        ValueError, TypeError: ``every`` is not that.
    """

    def __init__(self, every: Every) -> None:
        self._every = every if callable(every) else _checked(every)
        self.since = 0
        """Mini-batches since the last one that was."""

    def every(self, epoch: int) -> int:
        """The present period.

        Raises:
            ValueError, TypeError: the callable's answer is no int of at least 1.
        """
        return _checked(self._every(epoch) if callable(self._every) else self._every)

    def due(self, epoch: int) -> bool:
        """Whether the mini-batch that comes next is one."""
        return self.since + 1 >= self.every(epoch)

    def advance(self, epoch: int) -> None:
        """A mini-batch has passed."""
        self.since = 0 if self.due(epoch) else self.since + 1

    def state_dict(self) -> dict[str, int]:
        return {"since": self.since}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.since = state["since"]


class Refresher:
    """Opens the prefix for the mini-batches that are due, and closes it behind them, as the optimizers make their steps.

    A mini-batch ends when every optimizer has made its step; one that ``GradScaler`` leaves out is none. While the prefix is open
    it makes no local updates.

    Args:
        refresh: says which mini-batches are due.
        optimizers: all that step in a mini-batch; their steps are watched.
        epoch: called for the present epoch.
        fewer: called when the prefix was closed and the user has frozen parameters in it meanwhile.
    """

    def __init__(
        self,
        refresh: Refresh,
        optimizers: Sequence[Optimizer],
        updater: HebbianUpdater | None,
        *,
        epoch: Callable[[], int],
        fewer: Callable[[], None],
    ) -> None:
        self.refresh = refresh
        self.freeze: PrefixFreeze | None = None
        """What there is to open, once the order of the layers is known."""
        self._optimizers, self._updater, self._epoch, self._fewer = optimizers, updater, epoch, fewer
        self._stepped: set[Optimizer] = set()  # in the present mini-batch
        self._refreshed: set[Optimizer] = set()  # stepped with gradients of the prefix since it was opened
        self._late: set[Optimizer] = set()  # yet to step with the prefix's gradients, though it is closed again
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def mini_batch_passed(self) -> None:
        """Count a mini-batch; the optimizers' hooks do, but where a graph makes their steps."""
        self._stepped.clear()
        if self.freeze is not None and self.freeze.boundary > 0:
            self.refresh.advance(self._epoch())
            self.open_if_due()

    def open_if_due(self) -> None:
        """Decide whether the next mini-batch goes through the prefix."""
        assert self.freeze is not None
        due = self.freeze.boundary > 0 and self.refresh.due(self._epoch())
        if self.freeze.is_open and not due:
            # If one missed a step, mini-batches seem to end with a step too few: it has yet to use its gradients.
            self._late = set(self._optimizers) - self._refreshed
            self._refreshed.clear()
        before = self.freeze.forgotten
        self.freeze.set_open(due, keep_gradients_of=self._late)
        if self._updater is not None:
            self._updater.paused = due
        if self.freeze.forgotten > before:
            self._fewer()

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if leaves_out(optimizer):
            return
        if self.freeze is not None:
            if optimizer in self._late:
                self._late.discard(optimizer)
                self.freeze.drop_gradients(optimizer)
            if self.freeze.is_open and self.freeze.has_gradients(optimizer):
                self._refreshed.add(optimizer)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self.mini_batch_passed()


def _checked(every: object) -> int:
    if isinstance(every, bool) or not isinstance(every, Integral):
        raise TypeError(f"refresh must be an int, a callable of the epoch or None, got {every!r}")
    if every < 1:
        raise ValueError(f"refresh must be at least 1, got {every}")
    return int(every)
