"""The training set of a run whose epochs may begin where the frozen prefix ends, and its way through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from localsgd_ext import LocalizedLearning, ReplayLoader
from localsgd_ext.train.data import Batch, Data


class _Telling(ReplayLoader):
    """Into the run's log, not only onto a screen nobody looks at."""

    say: Callable[[str], None]

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")


class TrainingSet:
    """Mini-batches of ``data`` in each epoch; with ``budget`` bytes, those of an epoch whose boundary stays are replayed.

    Args:
        local: what has the boundary; needed with a budget.
        say: is told why nothing is replayed.
    """

    def __init__(self, data: Data, local: LocalizedLearning | None, budget: int | None, say: Callable[[str], None]) -> None:
        self._data = data
        self._epoch, self._size = 0, None if budget is None else 0
        self._loader: _Telling | None = None
        self._recorded: int | None = None
        if budget is not None:
            assert local is not None  # the configuration refuses others
            self._loader = _Telling(self, local, memory_budget=budget)
            self._loader.say = say

    @property
    def replayed(self) -> bool:
        """Whether the last epoch was."""
        return self._loader is not None and self._loader.replaying

    def __len__(self) -> int:
        return self._data.steps

    def __iter__(self) -> Iterator[Batch]:
        return self._data.train(self._epoch, self._size)

    def epoch(self, number: int, size: int) -> Iterator[Batch]:
        """The mini-batches of epoch ``number``, from 0, of ``size`` pictures."""
        self._epoch, self._size = number, size
        if self._loader is None:
            yield from self
            return
        yield from self._loader
        if not self._loader.replaying:
            self._recorded = number if self._loader.begins_behind is not None else None

    def state_dict(self) -> dict[str, int | None]:
        """Which epoch is kept."""
        return {"recorded": self._recorded}

    def load_state_dict(
        self,
        state: dict[str, int | None] | None,
        size: int,
        seed: Callable[[int], None],
        forward: Callable[[Tensor, Tensor], Any],
    ) -> None:
        """Make the forwards of the epoch that was kept again, whose random numbers ``seed`` brings back."""
        number = state["recorded"] if state else None
        if self._loader is None or number is None:
            return
        self._epoch, self._size, self._recorded = number, size, number
        with self._loader.rebuilding():
            seed(number)
            for x, y in self._loader:
                forward(x, y)
