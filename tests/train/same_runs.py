"""What two runs that must be the same have in common: everything but the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from localsgd_ext.train.files import read_json_lines

TIMES = {"train_seconds", "elapsed_train_seconds", "images_per_second", "step_ms"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path / "model.pt", weights_only=True)
    return loaded


def metrics(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_json_lines(path / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights, to the bit, and the same entry for every epoch."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert metrics(one) == metrics(other)
