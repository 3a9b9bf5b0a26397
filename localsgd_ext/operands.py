"""Which argument of an operation is of a wrong type, found after C++ has refused the call: the check costs nothing before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_ints(value: object) -> bool:
    return _is_int(value) or (isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_int, value)))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_tensor_or_none(value: object) -> bool:
    return value is None or isinstance(value, Tensor)


_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("weight", "x"), (_is_tensor, "a tensor")),
    **dict.fromkeys(("z", "bias", "skipped"), (_is_tensor_or_none, "a tensor or None")),
    **dict.fromkeys(("stride", "dilation"), (_is_ints, "an int or several")),
    "padding": (lambda value: isinstance(value, str) or _is_ints(value), "an int, several, or a name"),
    "groups": (_is_int, "an int"),
    "lr": (lambda value: isinstance(value, Real | Tensor), "a number or a tensor"),
    **dict.fromkeys(("padding_mode", "algorithm"), (lambda value: isinstance(value, str), "a name")),
    **dict.fromkeys(("z_is_output", "normalize"), (lambda value: isinstance(value, bool), "a bool")),
}


def named(error: TypeError, arguments: dict[str, Any]) -> TypeError:
    """The error to raise for ``error``, which a call with these arguments raised: one that names the argument, if that was why."""
    if "incompatible function arguments" in str(error):  # pybind11's words, followed by a signature that names none
        for name, value in arguments.items():
            fits, wanted = _WANTED[name]
            if not fits(value):
                return TypeError(f"{name} must be {wanted}, got {value!r}")
    return error
