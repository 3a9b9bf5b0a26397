"""The directory of a run: configuration, environment, log, metrics and TensorBoard events; checkpoints lie beside them."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localsgd_ext.train import environment
from localsgd_ext.train.config import RunConfig, differences
from localsgd_ext.train.events import EventFile
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
from localsgd_ext.train.measure import PHASES

CONFIG, ENVIRONMENT, LOG, METRICS, SUMMARY = "config.json", "environment.json", "log.txt", "metrics.jsonl", "summary.json"
LOCK, LAUNCH = ".lock", ".launch"
_CURVES = ("train_loss", "test_loss", "test_accuracy", "boundary", "batch_size", "lr", "local_lr", "images_per_second")

# What a table needs, and a run that goes on. Entries of older runs have no more than that.
_RECORDED = {
    *("num_layers", "boundary", "train_images", "test_images", "test_accuracy"),
    *("elapsed_train_seconds", "step_ms", "saved_activation_bytes"),
}

# NFS without its lock service, file systems without locks or mounted without them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


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

    Args:
        launch: names who started this process (``World.launch``), for :func:`launched_by`.
    Raises:
        ValueError: rather than mixing two runs or overwriting one, or where another process is at work in ``path``.
    """

    def __init__(self, path: Path, config: RunConfig, *, resume: bool, launch: str = "") -> None:
        self.path, self.config = path, config
        self._lock: int | None = None
        self._events: EventFile | None = None
        notes: list[str] = []
        if resume:
            changed = differences(read_config(path), config)
            if changed:
                raise ValueError(f"--resume: the run in {path} was started with other options: {'; '.join(changed)}")
            self._lock = lock(path, notes.append)
            for leftover in unfinished(path):
                leftover.unlink()
        else:
            require_empty(path)
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path, notes.append)
            require_empty(path)  # another process may have run in it between the check and the lock
        if launch:
            write_atomically(path / LAUNCH, launch.encode())
        if not resume:
            write_json(path / CONFIG, config.to_json())
        here = environment.describe(config.device)
        before = read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else here
        self.log(("resumed" if resume else "started") + " with " + " ".join(here["command"]))
        for note in notes:
            self.log(note)
        for key in ("torch", "cpu", "gpu", "threads", "localsgd_ext", "compiled_kernels"):
            if before.get(key) != here[key]:
                self.log(f"environment: {key} was {before.get(key)}, is {here[key]}: results may differ in the last bits")
        self._has_tensorboard = importlib.util.find_spec("tensorboard") is not None
        if not self._has_tensorboard:
            self.log("tensorboard is not installed: no curves are written for it")
        write_json(path / ENVIRONMENT, here)

    def log(self, line: str) -> None:
        """Append a line with the time of day."""
        path = self.path / LOG
        with naming(path), path.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def metrics(self) -> list[dict[str, Any]]:
        """One entry per finished epoch."""
        return read_metrics(self.path)

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Forget what was measured after ``epochs`` epochs: the run goes on from there."""
        kept = [m for m in self.metrics() if m["epoch"] <= epochs]
        write_json_lines(self.path / METRICS, kept)
        return kept

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Record an epoch, in the JSON lines and for TensorBoard if there is one."""
        append_json_line(self.path / METRICS, metrics)
        if not self._has_tensorboard:
            return
        epoch = metrics["epoch"]
        with naming(self.path / "tensorboard"):
            if self._events is None:
                self._events = EventFile(self.path / "tensorboard", epoch)
            curves = {name: metrics[name] for name in _CURVES if metrics[name] is not None}
            curves["saved_activations_mib"] = metrics["saved_activation_bytes"] / 2**20
            curves |= {f"step_ms/{phase}": milliseconds for phase, milliseconds in metrics["step_ms"].items()}
            self._events.add(epoch, curves)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def launched_by(path: Path, launch: str) -> bool:
    """Whether one of the torchruns named in ``launch`` (``World.launch``) has started the run in ``path`` before, if there is one."""
    if not launch or not (path / CONFIG).is_file() or not (path / LAUNCH).is_file():
        return False
    return not set(launch.splitlines()).isdisjoint((path / LAUNCH).read_text(errors="replace").splitlines())


def lock(path: Path, log: Callable[[str], None] = lambda _: None) -> int:
    """Keep other processes out of the directory ``path`` until the descriptor returned is closed, or this process has died.

    The system drops the lock of a process that was killed. It is a record lock, which worker processes do not inherit: one
    that outlives its killed parent by a moment does not stand in the way. Within one process it keeps nobody out. Where the
    file system has no locks nobody is kept out; that is warned of, and logged.

    Raises:
        DirectoryInUse: another process holds it; it is named.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with naming(path / LOCK):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                said = f"a second process is not kept out of {path}: its file system refuses locks ({error.strerror})"
                warnings.warn(said, UserWarning, stacklevel=3)
                log(f"warning: {said}")
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of the epochs that the run in ``path`` has recorded. Raises ``ValueError`` if the file is damaged."""
    entries = read_json_lines(path / METRICS)
    for number, entry in enumerate(entries, start=1):
        whole = isinstance(entry, dict) and entry.get("epoch") == number and entry.keys() >= _RECORDED
        if not whole or entry["step_ms"].keys() != set(PHASES):
            raise ValueError(f"{path / METRICS}, line {number}, is not what was measured in epoch {number}")
    return entries


def epochs_done(path: Path) -> int:
    """How many epochs the run in ``path`` has recorded; 0 if there is none. Raises ``ValueError`` if the file is damaged."""
    return len(read_metrics(path))


def require_empty(path: Path) -> None:
    """Raises ``ValueError`` if ``path`` exists and holds anything."""
    if path.exists() and (not path.is_dir() or set(path.iterdir()) - {path / LOCK, path / LAUNCH, *unfinished(path)}):
        raise ValueError(
            f"--out {path} exists and is not empty: choose another directory, or continue the run in it with --resume"
        )
