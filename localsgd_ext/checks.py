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
    """What the argument ``name``, a callable of the epoch, answers. Raises ``TypeError`` if that is no number."""
    value = function(epoch)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}({epoch}) must be a number, got {value!r}") from None
