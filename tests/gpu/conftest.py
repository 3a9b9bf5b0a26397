"""Tests that need a GPU; without one they are skipped, or those that can run on an emulated one (``--emulated``)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))  # the package benchmarks: what the suite and these tests share


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from layers import DEVICE  # after --emulated has put its module in place

    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _deterministic_library() -> Iterator[None]:
    """Where ``library`` runs, the same bits are expected of it."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before
