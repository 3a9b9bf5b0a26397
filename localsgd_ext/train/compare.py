"""Methods side by side: the same first weights and the same data, epoch by epoch in turn.

Epochs are interleaved, and the order rotates, so that a machine that slows down for a minute slows every method alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsgd_ext.train import data, models, report
from localsgd_ext.train.config import METHODS, NEED_BOUNDARY, NOT_PREFIX, RunConfig, differences, flag, resolve
from localsgd_ext.train.files import read_json, write_json
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Progress
from localsgd_ext.train.rundir import CONFIG, SUMMARY, RunDirectory, epochs_done, lock, require_empty

PLAN = "compare.json"


class RunRefused(ValueError):
    """One of the runs cannot be begun, or not gone on with; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """Which methods over which seeds; ``configs[method]`` is the run of that method, at the first seed."""

    configs: dict[str, RunConfig]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.configs) < 1:
            raise ValueError(f"--methods must name at least one of {', '.join(METHODS)}")
        if len(self.seeds) < 1:
            raise ValueError("--seeds must be at least 1")

    @property
    def first(self) -> RunConfig:
        return next(iter(self.configs.values()))

    def to_json(self) -> dict[str, Any]:
        return {"seeds": list(self.seeds), "configs": {m: c.to_json() for m, c in self.configs.items()}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Comparison:
        return cls({m: RunConfig.from_json(c) for m, c in value["configs"].items()}, tuple(value["seeds"]))


def parse_methods(text: str) -> tuple[str, ...]:
    """``sgd,freeze,local`` as a tuple. Raises ``ValueError`` for one that is unknown or named twice."""
    methods = tuple(m.strip() for m in text.split(",") if m.strip())
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods must be among {', '.join(METHODS)}, got {method!r}")
    if len(set(methods)) != len(methods):
        raise ValueError(f"--methods names a method twice: {text}")
    return methods


def options_for(method: str, methods: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    """``flags`` as ``method`` takes them among ``methods``: a method without a boundary leaves out what needs one.

    Where no method has a boundary, nothing is left out: the configuration refuses it.
    """
    if method not in NOT_PREFIX or all(m in NOT_PREFIX for m in methods):
        return flags
    return {name: value for name, value in flags.items() if name not in NEED_BOUNDARY}


def left_out(comparison: Comparison) -> str | None:
    """Which options do not hold for which methods; ``None``: all hold for all."""
    without = [method for method in comparison.configs if method in NOT_PREFIX]
    plain = {config: resolve(config.data, config.model, config.method) for config in comparison.configs.values()}
    asked = [
        f"--{flag(name)}"
        for name in NEED_BOUNDARY
        if any(getattr(config, name) != getattr(default, name) for config, default in plain.items())
    ]
    if not without or not asked:
        return None
    return f"{', '.join(asked)}: not for {', '.join(without)}, without a boundary"


def read(out: Path) -> Comparison:
    """The comparison begun in ``out``. Raises ``ValueError`` if there is none."""
    if not (out / PLAN).is_file():
        raise ValueError(f"--resume: there is no comparison in {out} (no {PLAN})")
    try:
        return Comparison.from_json(read_json(out / PLAN))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out / PLAN} is not a comparison: {error!r}") from None


def start(comparison: Comparison, out: Path, log: Callable[[str], None], *, resume: bool) -> data.Data:
    """Check everything, set up ``out`` and load the data of the first seed. Other processes are kept out until this one ends.

    Raises:
        ValueError: ``out`` holds something else, or a comparison with other options, or another process is at work in it; data
            or model cannot be had.
    """
    if resume:
        _require_same(read(out), comparison, out)
        lock(out, log)
    else:
        require_empty(out)
    models.check_name(comparison.first.model)
    pending = _pending(comparison, out)
    loaded = data.load(comparison.first.replace(seed=pending[0] if pending else comparison.seeds[0]), log)
    if not resume:  # only now: a run that could not start leaves nothing behind
        out.mkdir(parents=True, exist_ok=True)
        lock(out, log)
        require_empty(out)
        write_json(out / PLAN, comparison.to_json())
    return loaded


def resumed(out: Path, methods: Sequence[str] | None, seeds: int | None, flags: dict[str, Any]) -> Comparison:
    """The comparison in ``out`` with the given options on top, so that :func:`start` finds what has changed; ``None``: not given.

    Raises:
        ValueError: there is none, or it is of other methods or seeds; an option is wrong.
    """
    saved = read(out)
    names = tuple(saved.configs if methods is None else methods)
    first_seed = flags.get("seed", saved.seeds[0])
    asked_seeds = tuple(range(first_seed, first_seed + (len(saved.seeds) if seeds is None else seeds)))
    if (tuple(saved.configs), saved.seeds) != (names, asked_seeds):
        raise ValueError(
            f"--resume: {out} compares {', '.join(saved.configs)} over seeds {list(saved.seeds)}, "
            f"asked for {', '.join(names)} over seeds {list(asked_seeds)}"
        )
    return Comparison({m: c.replace(**options_for(m, names, flags)) for m, c in saved.configs.items()}, saved.seeds)


def _require_same(saved: Comparison, asked: Comparison, out: Path) -> None:
    for method, config in asked.configs.items():
        changed = differences(saved.configs[method], config)
        if changed:
            raise ValueError(f"--resume: {method} in {out} was started with other options: {'; '.join(changed)}")


def _pending(comparison: Comparison, out: Path) -> list[int]:
    return [seed for seed in comparison.seeds if not all(_finished(out, m, seed) for m in comparison.configs)]


def run(
    comparison: Comparison,
    out: Path,
    loaded: data.Data,
    make_progress: Callable[[int], Progress],
) -> None:
    """Run what is not finished yet. ``make_progress(n)`` makes the display of a job of ``n`` training pictures.

    Raises:
        RunRefused: a run cannot be made, or what there is of it is damaged.
    """
    pending = _pending(comparison, out)
    with _refusals():
        epochs = sum(c.epochs - epochs_done(run_path(out, m, seed)) for seed in pending for m, c in comparison.configs.items())
    with make_progress(epochs * loaded.steps * comparison.first.batch_size) as progress:
        for seed in pending:
            if seed != pending[0]:
                loaded = data.load(comparison.first.replace(seed=seed), progress.say)
            _run_seed(comparison, seed, loaded, out, progress)


def _run_seed(comparison: Comparison, seed: int, shared: data.Data, out: Path, progress: Progress) -> None:
    with _refusals():
        trainers = [
            _trainer(config.replace(seed=seed), run_path(out, method, seed), shared, progress, f"{method} seed {seed}")
            for method, config in comparison.configs.items()
            if not _finished(out, method, seed)
        ]
    trainers[0].warm_up()
    for epoch in range(comparison.first.epochs):
        for trainer in _rotated(trainers, epoch + seed):
            if trainer.epoch != epoch:
                continue
            try:
                trainer.run_epoch()
            except FloatingPointError as error:  # --nan-policy raise
                raise FloatingPointError(f"{trainer.label}: {error}") from None
    for trainer in trainers:
        trainer.finish()


def _trainer(config: RunConfig, path: Path, shared: data.Data, progress: Progress, label: str) -> Trainer:
    """At the first epoch of the run in ``path``, or where that was left."""
    resume = (path / CONFIG).exists()
    made = Trainer(config, shared, RunDirectory(path, config, resume=resume), progress, label, among_others=True)
    if resume:
        made.restore()
    return made


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RunRefused(str(error)) from None


def run_path(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-seed{seed}"


def _finished(out: Path, method: str, seed: int) -> bool:
    return (run_path(out, method, seed) / SUMMARY).exists()


def _rotated(trainers: Sequence[Trainer], by: int) -> list[Trainer]:
    by %= len(trainers)
    return [*trainers[by:], *trainers[:by]]


def runs(out: Path) -> list[report.Run]:
    """The finished runs of a comparison, from its files."""
    comparison = read(out)
    return [
        report.read_run(run_path(out, method, seed))
        for method in comparison.configs
        for seed in comparison.seeds
        if _finished(out, method, seed)
    ]
