"""Refresh: now and then a mini-batch back-propagates through the local prefix too."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

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
        self._since = 0  # mini-batches since the last refresh

    def every(self, epoch: int) -> int:
        """The present period.

        Raises:
            ValueError, TypeError: the callable's answer is no int of at least 1.
        """
        return _checked(self._every(epoch) if callable(self._every) else self._every)

    def due(self, epoch: int) -> bool:
        """Whether the mini-batch that comes next is one."""
        return self._since + 1 >= self.every(epoch)

    def advance(self, epoch: int) -> None:
        """A mini-batch has passed."""
        self._since = 0 if self.due(epoch) else self._since + 1

    def state_dict(self) -> dict[str, int]:
        return {"since": self._since}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._since = state["since"]


def _checked(every: object) -> int:
    if isinstance(every, bool) or not isinstance(every, Integral):
        raise TypeError(f"refresh must be an int, a callable of the epoch or None, got {every!r}")
    if every < 1:
        raise ValueError(f"refresh must be at least 1, got {every}")
    return int(every)
