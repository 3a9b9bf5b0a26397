"""The directory of a run: configuration, environment, log, metrics and TensorBoard events; checkpoints lie beside them."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Any

from localsgd_ext.train import environment
from localsgd_ext.train.config import RunConfig, differences
from localsgd_ext.train.files import (
    append_json_line,
    naming,
    read_json,
    read_json_lines,
    unfinished,
    write_atomically,
    write_json,
    write_json_lines,
)

CONFIG, ENVIRONMENT, LOG, METRICS, SUMMARY = "config.json", "environment.json", "log.txt", "metrics.jsonl", "summary.json"
LOCK, LAUNCH = ".lock", ".launch"


class DirectoryInUse(ValueError):
    """Another process is at work in a directory; the message names both."""


def read_config(path: Path) -> RunConfig:
    """The configuration of a run that was started before. Raises ``ValueError`` if there is none or it is damaged."""
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"--resume: there is no run in {path} (no {CONFIG})")
    try:
        return RunConfig.from_json(read_json(file))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


class RunDirectory:
    """Opens ``path`` for a run, and keeps other processes out of it until :meth:`close`.

    Raises:
        ValueError: rather than mixing two runs or overwriting one, or where another process is at work in ``path``.
    """

    def __init__(self, path: Path, config: RunConfig, *, resume: bool, launch: str = "") -> None:
        self.path, self.config = path, config
        self._lock: int | None = None
        if resume:
            changed = differences(read_config(path), config)
            if changed:
                raise ValueError(f"--resume: the run in {path} was started with other options: {'; '.join(changed)}")
            self._lock = lock(path)
            for leftover in unfinished(path):
                leftover.unlink()
        else:
            require_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path)
            require_empty(path)  # another process may have run in it between the check and the lock
            if launch:
                write_atomically(path / LAUNCH, launch.encode())
            write_json(path / CONFIG, config.to_json())
        here = environment.describe(config.device)
        before = read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else here
        self.log(("resumed" if resume else "started") + " with " + " ".join(here["command"]))
        for key in ("torch", "cpu", "gpu", "threads", "localsgd_ext", "compiled_kernels"):
            if before.get(key) != here[key]:
                self.log(f"environment: {key} was {before.get(key)}, is {here[key]}: results may differ in the last bits")
        write_json(path / ENVIRONMENT, here)
        self._writer: Any = None

    def log(self, line: str) -> None:
        """Append a line with the time of day."""
        path = self.path / LOG
        with naming(path), path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def metrics(self) -> list[dict[str, Any]]:
        """One entry per finished epoch."""
        return read_json_lines(self.path / METRICS)

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Forget what was measured after ``epochs`` epochs: the run goes on from there."""
        kept = [m for m in self.metrics() if m["epoch"] <= epochs]
        write_json_lines(self.path / METRICS, kept)
        return kept

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Record an epoch, in the JSON lines and for TensorBoard."""
        append_json_line(self.path / METRICS, metrics)
        epoch = metrics["epoch"]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch)
        for name in (
            "train_loss",
            "test_loss",
            "test_accuracy",
            "boundary",
            "batch_size",
            "lr",
            "local_lr",
            "images_per_second",
        ):
            if metrics[name] is not None:
                self._writer.add_scalar(name, metrics[name], epoch)
        self._writer.add_scalar("saved_activations_mib", metrics["saved_activation_bytes"] / 2**20, epoch)
        for phase, milliseconds in metrics["step_ms"].items():
            self._writer.add_scalar(f"step_ms/{phase}", milliseconds, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def launched_by(path: Path) -> str | None:
    """Which torchrun (``World.launch``) began the run in ``path``, if there is one and any did."""
    return (path / LAUNCH).read_text() if (path / CONFIG).is_file() and (path / LAUNCH).is_file() else None


def lock(path: Path) -> int:
    """Keep other processes out of the directory ``path`` until the descriptor returned is closed, or this process has died.

    The system drops the lock of a process that was killed. It is a record lock, which worker processes do not inherit: one
    that outlives its killed parent by a moment does not stand in the way. Within one process it keeps nobody out.

    Raises:
        DirectoryInUse: another process holds it; it is named.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with naming(path / LOCK):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
        os.close(descriptor)
        raise DirectoryInUse(f"{path} is in use by {holder or 'another process'}: wait for it, or stop it first") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class WatchedRunDirectory(RunDirectory):
    """The same directory for the processes beside the first: they read, and write nothing."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config

    def log(self, line: str) -> None:
        pass

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        return [m for m in self.metrics() if m["epoch"] <= epochs]

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def epochs_done(path: Path) -> int:
    """How many epochs the run in ``path`` has recorded; 0 if there is none."""
    return len(read_json_lines(path / METRICS))


def require_empty(path: Path) -> None:
    """Raises ``ValueError`` if ``path`` exists and holds anything."""
    if path.exists() and (not path.is_dir() or set(path.iterdir()) - {path / LOCK, path / LAUNCH, *unfinished(path)}):
        raise ValueError(
            f"--out {path} exists and is not empty: choose another directory, or continue the run in it with --resume"
        )
