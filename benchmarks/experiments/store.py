"""What came out of the cells, a line of JSON each, a file for each data set and model."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.cells import Cell, Network, key_of
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json_lines

# Of an epoch. Times are not among them: they are measured elsewhere, on a quiet machine.
COLUMNS = (
    "boundary", "train_loss", "test_loss", "test_accuracy", "multiply_adds", "saved_activation_bytes", "peak_device_bytes",
    "lr", "local_lr", "batch_size", "reductions", "reduced_bytes"
)  # fmt: skip
ONCE = ("num_layers", "train_images", "test_images")  # the same in all epochs
ENVIRONMENT = ("torch", "cpu", "gpu", "threads", "localsgd_ext", "git_commit", "compiled_kernels")


@dataclass(frozen=True)
class Result:
    """A finished cell."""

    config: RunConfig
    epochs: dict[str, list[Any]]
    """A list for each of :data:`COLUMNS`."""
    about: dict[str, Any]
    environment: dict[str, Any]
    hours: float
    """Of training, on one core or GPU."""
    processes: int = 1

    @property
    def accuracy(self) -> float:
        """After the last epoch, in percent."""
        return 100 * float(self.epochs["test_accuracy"][-1])

    @property
    def macs(self) -> float:
        """Multiply-adds of all training steps."""
        return float(sum(self.epochs["multiply_adds"]))

    @property
    def boundaries(self) -> list[int]:
        return [int(boundary) for boundary in self.epochs["boundary"]]

    @property
    def batches(self) -> list[int]:
        """Pictures in a mini-batch, of all processes together, epoch by epoch."""
        kept = self.epochs.get("batch_size") or [None]  # not in lines from before it could grow
        return [self.config.batch_size] * len(self.boundaries) if None in kept else [int(size) for size in kept]

    @property
    def mini_batches(self) -> list[int]:
        """In each epoch."""
        return [int(self.about["train_images"]) // size for size in self.batches]

    def total(self, column: str) -> int | None:
        """A column's sum; ``None`` where it was not kept."""
        kept = self.epochs.get(column) or [None]
        return None if None in kept else sum(kept)


def line(
    config: RunConfig, metrics: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], processes: int = 1
) -> dict[str, Any]:
    """What is kept of a run."""
    cores = processes * (1 if environment["gpu"] else environment["threads"])
    return {
        **({"processes": processes} if processes > 1 else {}),
        "config": config.replace(root=None).to_json(),
        **{name: metrics[-1][name] for name in ONCE},
        "hours": metrics[-1]["elapsed_train_seconds"] * cores / 3600,
        "environment": {name: environment[name] for name in ENVIRONMENT},
        "epochs": {name: [m.get(name) for m in metrics] for name in COLUMNS},
    }


def _result(saved: Mapping[str, Any]) -> Result:
    about = {name: saved[name] for name in ONCE}
    config = RunConfig.from_json(saved["config"])
    return Result(config, saved["epochs"], about, saved["environment"], saved["hours"], saved.get("processes", 1))


class Store:
    """The results under ``directory``. Several processes may add to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Network, dict[str, Result]] = {}

    def path(self, network: Network) -> Path:
        return self.directory / f"{network[0]}-{network[1].replace(':', '-')}.jsonl"

    def refresh(self) -> None:
        """See what other processes have added."""
        self._read.clear()

    def _of(self, network: Network) -> dict[str, Result]:
        if network not in self._read:
            found = map(_result, read_json_lines(self.path(network)))
            self._read[network] = {key_of(result.config, result.processes): result for result in found}
        return self._read[network]

    def get(self, cell: Cell) -> Result | None:
        return None if cell.config is None else self._of(cell.network).get(cell.key)

    def add(self, network: Network, entry: Mapping[str, Any]) -> None:
        """Appends; what a killed process left of a line goes."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.path(network).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write((json.dumps(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self._read.pop(network, None)

    def by_label(self, cells: Iterable[Cell]) -> dict[str, dict[int, Result]]:
        """The finished ones among ``cells`` of one network: label to seed to result."""
        found: dict[str, dict[int, Result]] = {}
        for cell in cells:
            if (result := self.get(cell)) is not None:
                found.setdefault(cell.variant.label, {})[cell.seed] = result
        return found
