"""Whether fp32 operands may be rounded to tf32, by whichever of PyTorch's two APIs the user said so.

The older attributes ``allow_tf32`` raise once the newer ``fp32_precision`` (PyTorch 2.9) was set for one operation alone; the newer
ones can always be read, and follow the older.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_MATMUL = torch.backends.cuda.matmul
_CUDNN = torch.backends.cudnn


def _new() -> tuple[Any, ...]:
    """What has ``fp32_precision``: of matrix products, of convolutions, and of what cuDNN's older flag means as well."""
    if not hasattr(_CUDNN, "conv") or not hasattr(_MATMUL, "fp32_precision"):
        return ()
    return _MATMUL, _CUDNN.conv, _CUDNN.rnn


def tf32_allowed(linear: bool) -> bool:
    """Return whether PyTorch may round fp32 operands to tf32: of linear layers (cuBLAS), or else of convolutions (cuDNN)."""
    if new := _new():
        return bool(new[0 if linear else 1].fp32_precision == "tf32")
    return bool(_MATMUL.allow_tf32 if linear else _CUDNN.allow_tf32)


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Allow it for both, or forbid it; afterwards all is as before, in both APIs."""
    older = []
    for backend in (_MATMUL, _CUDNN):
        with suppress(RuntimeError):  # the two disagree already: then the newer one alone is set
            older.append((backend, backend.allow_tf32))
    newer = [(backend, backend.fp32_precision) for backend in _new()]
    # The older ones first: setting them sets the newer, which decide.
    _set(older, newer, [on] * len(older), ["tf32" if on else "ieee"] * len(newer))
    try:
        yield
    finally:
        _set(older, newer, [value for _, value in older], [value for _, value in newer])


def _set(older: list[Any], newer: list[Any], allowed: list[bool], precisions: list[str]) -> None:
    for (backend, _), value in zip(older, allowed, strict=True):
        backend.allow_tf32 = value
    for (backend, _), precision in zip(newer, precisions, strict=True):
        backend.fp32_precision = precision
