"""Checks of what users give that several modules need."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any


def require_numbers(**values: object) -> None:
    """Raise ``TypeError`` for the first of ``values`` that is none; a bool is none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")


def answer(name: str, function: Callable[[int], Any], epoch: int) -> float:
    """What the argument ``name``, a callable of the epoch, answers.

    Raises:
        TypeError: that is no number, as a bool is none and no string.
    """
    value = function(epoch)
    try:
        if not isinstance(value, bool | str):  # float() takes these
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}({epoch}) must be a number, got {value!r}")
