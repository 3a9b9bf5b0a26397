"""What all tables have in common: the stamp of scale and cost, the spread over seeds, what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.experiments import student
from benchmarks.experiments.cells import Cell, Network
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result, Store


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def interval_note() -> str:
    return (
        "Accuracy after the last epoch, mean ± standard deviation; differences are taken seed by seed: mean [95 % confidence interval] "
        f"and p of the paired t-test, two-sided, of {student.LEAST} differences or more that are not all equal."
    )


def stamp(study: Study, cells: Iterable[Cell], store: Store, asked_seeds: int | None = None) -> str:
    """Scale, what was used of how much, core- or GPU-hours, hardware; ``asked_seeds`` where they are not as many as the scale's."""
    runs: dict[str, Result | None] = {c.key: store.get(c) for c in cells if c.config is not None}
    done = [result for result in runs.values() if result is not None]
    if not done:
        return f"Scale {study.scale.name}: none of {len(runs)} runs finished."
    # One run may stand for two: where the loss falls at once, one that does not wait for it is one that does.
    distinct = {(r.config.model, r.config.seed, r.environment["git_commit"], r.hours): r for r in done}.values()
    twice = f" ({len(done) - len(distinct)} of them the same as another)" if len(distinct) < len(done) else ""
    kind = "GPU-hours" if done[0].environment["gpu"] else "core-hours"
    where = sorted({str(r.environment["gpu"] or r.environment["cpu"]) for r in done})
    commits = sorted({str(r.environment["git_commit"])[:9] for r in done})
    sizes = sorted({_sizes(result) for result in done})
    changed = "".join(f", {name} {value}" for name, value in study.flags.items())
    changed += f", {asked_seeds} seeds as asked for" if asked_seeds is not None else ""
    return (
        f"Scale {study.scale.name}{changed}: {len(done)} of {len(runs)} runs finished{twice}, "
        f"{sum(r.hours for r in distinct):.2f} {kind} of training. "
        f"{'; '.join(sizes)}; seeds {', '.join(map(str, sorted({r.config.seed for r in done})))}. {'; '.join(where)}; "
        f"commit {', '.join(commits)}."
    )


def _sizes(result: Result) -> str:
    shared = f" over {result.processes} processes" if result.processes > 1 else ""
    return (
        f"{result.config.data}: {result.about['train_images']} training and {result.about['test_images']} test pictures, "
        f"batch {result.config.batch_size}{shared}"
    )


def missing(cells: Iterable[Cell], store: Store) -> str:
    """What no table can show yet, by name; empty if there is nothing."""
    absent: dict[str, str] = {}
    pending: dict[Network, dict[str, int]] = {}
    for cell in cells:
        if cell.missing:
            absent[f"{'/'.join(cell.network)}/{cell.variant.label}"] = cell.missing
        elif store.get(cell) is None:
            labels = pending.setdefault(cell.network, {})
            labels[cell.variant.label] = labels.get(cell.variant.label, 0) + 1
    lines = [f"Missing: {name}: {why}." for name, why in absent.items()]
    for network, labels in pending.items():
        named = "; ".join(f"{label} ({count} seed{'s' if count > 1 else ''})" for label, count in labels.items())
        lines.append(f"Not trained yet, {network[1]} on {network[0]}: {named}.")
    return "\n\n".join(lines)
