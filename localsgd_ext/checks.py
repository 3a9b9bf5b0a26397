"""Checks of what users give that several modules need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor


def require_numbers(**values: object) -> None:
    """Raise ``TypeError`` for the first of ``values`` that is none; a bool is none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}")


def number(name: str, value: object) -> float:
    """The argument ``name``, a number or a tensor of one element.

    Raises:
        TypeError: it is neither.
        ValueError: a tensor of more elements, or of none.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if not value.is_complex():
            return float(value.detach())
    elif not isinstance(value, bool | str):  # float() takes these
        with contextlib.suppress(TypeError, ValueError):
            return float(value)  # type: ignore[arg-type]
    raise TypeError(f"{name} must be a number, got {value!r}")


def answer(name: str, function: Callable[[int], Any], epoch: int) -> float:
    """What the argument ``name``, a callable of the epoch, answers.

    Raises:
        TypeError, ValueError: that is no number, see :func:`number`.
    """
    return number(f"{name}({epoch})", function(epoch))
