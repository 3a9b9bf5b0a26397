"""The emulated GPU from Python: its module in place of the compiled one, its size and order of execution, guarded tensors."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from second_build import EMULATED
from torch import Tensor


def install() -> None:
    """Make ``localsgd_ext`` import the emulated module."""
    EMULATED.install()
    emulate()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        _COVERAGE.unlink(missing_ok=True)


_COVERAGE = EMULATED.directory / "coverage.json"  # from the process that ran the tests to the one that prints


def save_coverage(counts: Mapping[str, int]) -> None:
    _COVERAGE.write_text(json.dumps(dict(sorted(counts.items()))))


def coverage_lines() -> list[str]:
    if not _COVERAGE.exists():
        return []
    counts = json.loads(_COVERAGE.read_text())
    return ["random layers on the emulated GPU:", *(f"{count:7d}  {what}" for what, count in counts.items())]


def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(EMULATED.module))
    library.localsgd_guarded.restype = ctypes.c_void_p
    return library


def emulate(*, seed: int = 0, multiprocessors: int = 3, blocks: int = 2, cooperative: bool = True, compute: int = 90) -> None:
    """What GPU the next launches run on, and in which order of blocks and threads; ``compute``: 75 for 7.5."""
    library().localsgd_emulate(seed, multiprocessors, blocks, int(cooperative), compute)


class Guarded:
    """Device memory against an unmapped page, with a guard zone on the other side; ``intact`` says whether that still is."""

    def __init__(self) -> None:
        self._memory: list[int] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values and strides in guarded memory, whose gaps hold NaN; it lives as long as this object."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() == 0:
            extent = 0
        count = extent * tensor.element_size()
        address = library().localsgd_guarded(ctypes.c_size_t(count))
        self._memory.append(address)
        if count == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        buffer = (ctypes.c_ubyte * count).from_address(address)
        flat = torch.frombuffer(buffer, dtype=tensor.dtype)
        copy = flat.as_strided(tensor.shape, tensor.stride())
        copy.copy_(tensor)
        return copy

    def intact(self) -> bool:
        return all(library().localsgd_intact(ctypes.c_void_p(address)) for address in self._memory)

    def __enter__(self) -> Guarded:
        return self

    def __exit__(self, *_: Any) -> None:
        for address in self._memory:
            library().localsgd_release(ctypes.c_void_p(address))
