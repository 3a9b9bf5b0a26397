"""The options of runs that take a second. Not in conftest.py: processes of their own import it, and there is more than one of those."""

from __future__ import annotations

from typing import Any

# The loss hardly falls. 14 layers and 4 epochs: equation 2 gives K = 1 (floored up), so the boundary may move after the second epoch.
TINY: dict[str, Any] = {
    "train_size": 96,
    "test_size": 40,
    "image_size": 8,
    "batch_size": 16,
    "epochs": 4,
    "lr": 0.02,
    "alpha": 9.0,
    "min_loss_drop": 0.0,
}
