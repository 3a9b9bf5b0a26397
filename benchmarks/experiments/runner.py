"""Trains the cells that are missing, seed by seed; a cell that was killed goes on from its last epoch."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.experiments import parallel
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.store import Store, line
from localsgd_ext.train import data, environment
from localsgd_ext.train import progress as plain
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Progress, Speed
from localsgd_ext.train.rundir import CONFIG, RunDirectory, epochs_done


def unfinished(cells: Sequence[Cell], store: Store, only: str = "") -> list[Cell]:
    """Those of ``cells`` that can be trained and are not yet, each run once, all of the first seed first."""
    pending: dict[str, Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):  # a stable sort
        if cell.config is not None and re.search(only, cell.name) and store.get(cell) is None:
            pending.setdefault(cell.key, cell)
    return list(pending.values())


class Job(Progress, Protocol):
    """Progress of all cells, whose total falls where some of them are not done after all."""

    @property
    def done(self) -> int:
        """Training pictures."""

    def drop(self, images: int) -> None:
        """So many are not to be done."""


class _Counted:
    _speed: Speed

    @property
    def done(self) -> int:
        return self._speed.done

    def drop(self, images: int) -> None:
        self._speed.total -= images


class Lines(_Counted, plain.Lines):
    """For logs."""


class Bar(_Counted, plain.Bar):
    """For a terminal."""

    def drop(self, images: int) -> None:
        super().drop(images)
        self._bar.update(self._task, total=self._speed.total)


class Runner:
    """``work`` is where the runs lie until they are finished, ``store`` where they go then."""

    def __init__(self, store: Store, work: Path, make_progress: Callable[[int], Job]) -> None:
        self.store, self.work, self.make_progress = store, work, make_progress
        self.failed: dict[str, str] = {}
        self._data: tuple[tuple[Any, ...], data.Data] | None = None

    def run(self, cells: Sequence[Cell], only: str = "", budget: float | None = None) -> list[Cell]:
        """Train what is missing, starting no cell after ``budget`` seconds. Returns what is left."""
        begin = time.monotonic()
        left = unfinished(cells, self.store, only)
        images = {cell.key: self._images(cell) for cell in left}
        with self.make_progress(sum(images.values())) as job:
            while left and (budget is None or time.monotonic() - begin <= budget):
                self.store.refresh()
                for cell in (cell for cell in left if self.store.get(cell) is not None):
                    job.advance(images[cell.key])  # another process did it meanwhile: the time left is that of all together
                left = [cell for cell in left if self.store.get(cell) is None]
                if left:
                    self._try(left.pop(0), images, job)
        self.store.refresh()
        return unfinished(cells, self.store, only)

    def _try(self, cell: Cell, images: Mapping[str, int], job: Job) -> None:
        before = job.done
        try:
            self._train(cell, job)
        except Exception as error:  # one bad cell must not cost a night's run
            self.failed[cell.name] = f"{type(error).__name__}: {error}"
            job.say(f"{cell.name} failed: {self.failed[cell.name]}")
        # What a failed cell left, or all of one that is another's; or the data are not as large as was thought.
        job.drop(images[cell.key] - (job.done - before))

    def _images(self, cell: Cell) -> int:
        """Training pictures that the cell still has to see, as far as that is known without its data."""
        assert cell.config is not None
        size = cell.config.train_size or {"imagenet": 1_281_167}.get(cell.config.data, 50_000)
        return (cell.config.epochs - epochs_done(self._directory(cell))) * (size - size % cell.config.batch_size)

    def _directory(self, cell: Cell) -> Path:
        config = cell.config
        assert config is not None
        return self.work / f"{config.data}-{config.model.replace(':', '-')}-{config.method}-seed{config.seed}-{cell.key}"

    def _train(self, cell: Cell, progress: Progress) -> None:
        assert cell.config is not None
        path = self._directory(cell)
        with _locked(path) as mine:
            if not mine:
                progress.say(f"{cell.name}: another process is at it")
                return
            self.store.refresh()
            if self.store.get(cell) is None:
                metrics = self._finish(cell, path, progress)
                here = environment.describe(cell.config.device)
                self.store.add(cell.network, line(cell.config, metrics, here, cell.variant.processes))
            shutil.rmtree(path, ignore_errors=True)

    def _finish(self, cell: Cell, path: Path, progress: Progress) -> list[dict[str, Any]]:
        assert cell.config is not None
        if cell.variant.processes > 1:
            return parallel.train(cell.config, path, cell.variant.processes, progress, cell.name)
        resume = (path / CONFIG).exists()
        loaded = self._load(cell.config, progress)
        # If it fails the directory is closed, too: another process may try.
        with contextlib.closing(RunDirectory(path, cell.config, resume=resume)) as directory:
            trainer = Trainer(cell.config, loaded, directory, progress, cell.name)
            if resume:
                trainer.restore()
            while not trainer.done:
                trainer.run_epoch()
            trainer.finish()
            return trainer.metrics

    def _load(self, config: RunConfig, progress: Progress) -> data.Data:
        """Runs of one seed share their data."""
        names = ("data", "seed", "root", "train_size", "test_size", "image_size", "batch_size", "channels_last", "device")
        key = tuple(getattr(config, name) for name in names)
        if self._data is None or self._data[0] != key:
            self._data = None  # both at once might not fit
            self._data = (key, data.load(config, progress.say))
        return self._data[1]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process alone works in ``path`` now. The system drops the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + ".lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)
