"""Times, apart from the runs: SGD and another method take turns, so that both see the same machine.

Where a step's time follows from the boundary, single steps are timed, without the loading of data, and whole runs are put together
from them: an epoch costs its steps at its boundary. The other methods' runs are made again, in turn with SGD's, epoch by epoch.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.cells import Network, digest
from benchmarks.experiments.store import Result
from benchmarks.records import MUST_AGREE, Records
from benchmarks.step_variants import LAYOUTS, Variant, make
from localsgd_ext import trace_layers
from localsgd_ext.train import data, environment, models
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Lines
from localsgd_ext.train.rundir import RunDirectory

FILE, CLAIMS = "timing.json", "section2.json"
LEAST_ROUNDS = 5
# Each row is a ratio to what was measured beside it, and says its commit.
SAME_MACHINE = tuple(key for key in MUST_AGREE if key != "git_commit")
WHOLE_RUN_HOURS = 0.5
"""The longest run that is made again for its time."""
# By method and bn_stats: the variant in benchmarks/step_variants.py. Other methods' steps do not follow from a boundary.
VARIANTS = {
    ("freeze", "update"): "frozen",
    ("freeze", "freeze"): "frozen eval",
    ("freeze", "fold"): "frozen fold",
    ("local", "update"): "local",
    ("local-paper", "update"): "local",
}
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """What a step's time depends on, beside method and boundary."""

    network: Network
    batch: int
    image: int
    classes: int
    device: str
    channels_last: bool
    amp: str

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        classes = {"glyphs": 26, "cifar100": 100, "imagenet": 1000}.get(config.data, 10)
        image = config.image_size or {"imagenet": 224, "digits": 16}.get(config.data, 32)
        rest = (config.device, config.channels_last, config.amp)
        return cls((config.data, config.model), config.batch_size, image, classes, *rest)

    @property
    def key(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{'/'.join(self.network)} b{self.batch} {self.image} px {self.device} {layout} {self.amp}"


class Timings:
    """Of a file: the ratio to a step of SGD, by method and boundary."""

    def __init__(self, rows: Mapping[str, Any] | None = None, claims: Mapping[str, Any] | None = None) -> None:
        self.rows, self.claims = rows or {}, claims or {}

    @classmethod
    def read(cls, directory: Path) -> Timings:
        return cls(*(read_json(path)["rows"] if (path := directory / name).exists() else None for name in (FILE, CLAIMS)))

    def share(self, config: RunConfig, boundary: int) -> float | None:
        """What a step that does not refresh takes, of SGD's."""
        if config.method == "sgd" or (boundary == 0 and _has_boundary(config)):
            return 1.0
        variant = _variant(config)
        row = None if variant is None else self.rows.get(_key(Shape.of(config), variant, boundary))
        return None if row is None else row["ms"] / row["sgd_ms"]

    def sgd_ms(self, config: RunConfig) -> float | None:
        """A step of SGD: the median over all that was measured beside it."""
        rows = [row for row in self.rows.values() if row["shape"] == Shape.of(config).key]
        return statistics.median(row["sgd_ms"] for row in rows) if rows else None

    def steps_of_sgd(self, result: Result) -> float | None:
        """The whole run's time, in steps of SGD; ``None`` if some of it was not measured."""
        if result.processes > 1 or len(set(result.batches)) > 1:
            return None  # steps are timed in one process, with the mini-batches of the beginning
        steps = result.mini_batches[0]
        if _only_whole(result.config):
            row = self.rows.get(_run_key(result.config))
            return None if row is None else row["ms"] / row["sgd_ms"] * steps * len(result.boundaries)
        refresh = 1 / result.config.refresh if result.config.refresh else 0.0
        total = 0.0
        for boundary in result.boundaries:
            share = self.share(result.config, boundary)
            if share is None:
                return None
            total += steps * (refresh + (1 - refresh) * share)  # a refresh is a step of SGD
        return total


def _only_whole(config: RunConfig) -> bool:
    return config.method != "sgd" and not _has_boundary(config)


def _has_boundary(config: RunConfig) -> bool:
    return any(config.method == method for method, _ in VARIANTS)


def _variant(config: RunConfig) -> str | None:
    """Whose step a step of ``config`` is; ``None`` where none was made for it."""
    return VARIANTS.get((config.method, config.bn_stats)) if config.sample == 1 else None


def _run_key(config: RunConfig) -> str:
    """One run stands for those of all seeds."""
    return f"run|{digest(config.replace(seed=0))}"


def _key(shape: Shape, variant: str, boundary: int) -> str:
    return f"{shape.key}|{variant}|{boundary}"


def measure(results: Iterable[Result], directory: Path, seconds: float, root: str | None = None, say: Any = print) -> None:
    """Time every step that ``results`` made and that is not in the file yet, ``seconds`` each; runs that are timed whole take theirs."""
    todo: dict[str, Callable[[], dict[str, Any]]] = {}
    devices = set()
    for result in results:
        if result.processes > 1:
            continue
        config = result.config.replace(root=root)
        devices.add(config.device)
        if (variant := _variant(config)) is not None:
            for boundary in sorted(set(result.boundaries) - {0}):
                wanted = (Shape.of(config), variant, boundary)
                todo.setdefault(_key(*wanted), partial(_row, *wanted, seconds))
        elif _only_whole(config) and config.seed == 0:
            if result.hours > WHOLE_RUN_HOURS:
                say(f"{config.model}, {config.method}: a run takes {result.hours:.1f} hours and is not made again for its time")
            else:
                todo.setdefault(_run_key(config), partial(_whole, config))
    if not todo:
        return
    assert len(devices) == 1, devices  # a scale has one
    records = records_of(directory / FILE, devices.pop())
    for key in records.todo(todo):
        row = todo[key]() | {"commit": environment.git_commit(), "status": "ok"}
        records.add(key, row)
        say(f"{key}: {row['ms'] / row['sgd_ms']:.3f} of SGD's {row['sgd_ms']:.2f} ms; {len(records.left)} to go")


def _whole(config: RunConfig) -> dict[str, Any]:
    """A run and SGD's, epoch by epoch in turn."""
    loaded = data.load(config)
    quiet = Lines(1, lambda line: None)
    spent = []
    with tempfile.TemporaryDirectory() as directory:
        both = [config.replace(method="sgd"), config]
        places = [RunDirectory(Path(directory) / str(i), one, resume=False) for i, one in enumerate(both)]
        trainers = [Trainer(one, loaded, place, quiet) for one, place in zip(both, places, strict=True)]
        trainers[0].warm_up()
        for epoch in range(config.epochs):
            for trainer in trainers[:: -1 if epoch % 2 else 1]:
                trainer.run_epoch()
        for trainer in trainers:
            trainer.finish()
            spent.append(1e3 * trainer.metrics[-1]["elapsed_train_seconds"] / (loaded.steps * config.epochs))
    shape = Shape.of(config).key
    return {"shape": f"{shape}, whole run", "method": config.method, "sgd_ms": spent[0], "ms": spent[1]}


def records_of(path: Path, device: str) -> Records:
    """Rows of any commit, all of this machine. Raises ``ValueError`` for those of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Records(path, {"environment": environment.describe(device)}, resume=True, must_agree=SAME_MACHINE)


def example(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, 3, shape.image, shape.image, generator=generator)
    y = torch.randint(shape.classes, (shape.batch,), generator=generator)
    return x.to(shape.device).to(memory_format=_layout(shape)), y.to(shape.device)


def start_of(shape: Shape) -> torch.nn.Module:
    model = models.build(shape.network[1], shape.classes, seed=0)
    return model.to(shape.device).to(memory_format=_layout(shape)).train()


def _layout(shape: Shape) -> torch.memory_format:
    return LAYOUTS["nhwc" if shape.channels_last else "nchw"]


def _row(shape: Shape, variant: str, boundary: int, seconds: float) -> dict[str, Any]:
    x, y = example(shape)
    start = start_of(shape)
    layers = len(trace_layers(start, x[:2]))
    both = [make(name, start, x[:2], boundary) for name in ("sgd", variant)]
    times: list[list[float]] = [[], []]
    for one in both:  # warm
        _step(one, x, y, shape)
    begin = time.monotonic()
    while len(times[0]) < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        for one, taken in zip(both, times, strict=True):
            taken.append(_step(one, x, y, shape))
    sgd_ms, ms = (1e3 * statistics.median(taken) for taken in times)
    return {
        "shape": shape.key, "variant": variant, "boundary": boundary, "layers": layers, "rounds": len(times[0]),
        "sgd_ms": sgd_ms, "ms": ms
    }  # fmt: skip


def autocast(shape: Shape) -> contextlib.AbstractContextManager[Any]:
    if shape.amp not in _AMP:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(shape.device).type, dtype=_AMP[shape.amp])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(variant: Variant, x: torch.Tensor, y: torch.Tensor, shape: Shape) -> float:
    """Seconds."""
    device = torch.device(shape.device)
    with autocast(shape):
        wait(device)
        begin = time.perf_counter()
        variant.step(x, y)
        wait(device)
        return time.perf_counter() - begin
