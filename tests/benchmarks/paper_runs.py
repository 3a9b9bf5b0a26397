"""Runs of benchmarks/paper.py at its smallest scale, real and made up."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.experiments.cells import Variant
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Result, Store, line

QUICK = ["--scale", "smoke", "--set", "train_size=32", "--set", "epochs=3"]
ENVIRONMENT = {
    "torch": "2", "cpu": "a", "gpu": None, "threads": 1, "localsgd_ext": "0", "git_commit": "abc", "compiled_kernels": True
}  # fmt: skip
SMOKE = Study(SCALES["smoke"])
NETWORK = ("fake", "small_resnet")


def places(directory: Path) -> list[str]:
    return ["--out", str(directory / "out"), "--work", str(directory / "work")]


def made(network: tuple[str, str], variant: Variant, seed: int, accuracies: list[float], macs: float = 1.0) -> dict[str, Any]:
    """A line of the store: a run that took ``macs`` an epoch."""
    config = SMOKE.config(network, variant.method, seed, **variant.flags)
    metrics = [
        {
            "num_layers": 14, "train_images": 64, "test_images": 40, "elapsed_train_seconds": 36.0, "boundary": epoch,
            "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": accuracy, "multiply_adds": macs,
            "saved_activation_bytes": 2**20 // (epoch + 1), "peak_device_bytes": None, "lr": 0.1, "local_lr": None
        }
        for epoch, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    return line(config, metrics, ENVIRONMENT, variant.processes)


def result(variant: Variant, seed: int, accuracy: float, macs: float = 1.0) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.add(NETWORK, made(NETWORK, variant, seed, [accuracy / 100], macs))
        found = store.get(SMOKE.cell(NETWORK, variant, seed))
    assert found is not None
    return found
