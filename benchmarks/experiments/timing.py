"""Times of single steps, apart from the runs: SGD and another method take turns, so that both see the same machine.

Whole runs are put together from them: an epoch costs its steps at its boundary. Loading data is not in it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.cells import Network
from benchmarks.experiments.store import Result
from benchmarks.records import MUST_AGREE, Records
from benchmarks.step_variants import LAYOUTS, Variant, make
from localsgd_ext import trace_layers
from localsgd_ext.train import environment, models
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json

FILE, CLAIMS = "timing.json", "section2.json"
LEAST_ROUNDS = 5
# Each row is a ratio to what was measured beside it, and says its commit.
SAME_MACHINE = tuple(key for key in MUST_AGREE if key != "git_commit")
# By method: its variant in benchmarks/step_variants.py. Other methods' steps do not follow from a boundary.
VARIANTS = {"freeze": "frozen", "local": "local", "local-paper": "local"}
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
        if config.method == "sgd" or (boundary == 0 and config.method in VARIANTS):
            return 1.0
        if config.method not in VARIANTS or config.sample != 1:
            return None
        row = self.rows.get(_key(Shape.of(config), VARIANTS[config.method], boundary))
        return None if row is None else row["ms"] / row["sgd_ms"]

    def sgd_ms(self, config: RunConfig) -> float | None:
        """A step of SGD: the median over all that was measured beside it."""
        rows = [row for row in self.rows.values() if row["shape"] == Shape.of(config).key]
        return statistics.median(row["sgd_ms"] for row in rows) if rows else None

    def steps_of_sgd(self, result: Result) -> float | None:
        """The whole run's time, in steps of SGD; ``None`` if some of its steps were not measured."""
        refresh = 1 / result.config.refresh if result.config.refresh else 0.0
        total = 0.0
        for boundary in result.boundaries:
            share = self.share(result.config, boundary)
            if share is None:
                return None
            total += result.steps * (refresh + (1 - refresh) * share)  # a refresh is a step of SGD
        return total


def _key(shape: Shape, variant: str, boundary: int) -> str:
    return f"{shape.key}|{variant}|{boundary}"


def measure(results: Iterable[Result], directory: Path, seconds: float, say: Any = print) -> None:
    """Time every step that ``results`` made and that is not in the file yet, ``seconds`` each."""
    todo: dict[str, tuple[Shape, str, int]] = {}
    for result in results:
        if result.config.method in VARIANTS and result.config.sample == 1:
            for boundary in sorted(set(result.boundaries) - {0}):
                wanted = (Shape.of(result.config), VARIANTS[result.config.method], boundary)
                todo.setdefault(_key(*wanted), wanted)
    if not todo:
        return
    devices = {shape.device for shape, *_ in todo.values()}
    assert len(devices) == 1, devices  # a scale has one
    records = records_of(directory / FILE, devices.pop())
    for key in records.todo(todo):
        row = _row(*todo[key], seconds) | {"commit": environment.git_commit()}
        records.add(key, row)
        say(f"{key}: {row['ms'] / row['sgd_ms']:.3f} of SGD's {row['sgd_ms']:.2f} ms; {len(records.left)} to go")


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
        "sgd_ms": sgd_ms, "ms": ms, "status": "ok"
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
