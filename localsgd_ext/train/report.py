"""Tables of finished runs, from their files alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsgd_ext.train.config import METHODS, RunConfig
from localsgd_ext.train.files import read_json, write_atomically, write_json
from localsgd_ext.train.measure import PHASES
from localsgd_ext.train.rundir import CONFIG, ENVIRONMENT, read_metrics

BASELINE = "sgd"
HEADER = (
    "method",
    "test accuracy, %",
    "minus SGD, points",
    "training time, s",
    "speed-up (by median steps)",
    f"step, ms ({' + '.join(PHASES)})",
    "last epoch's step, ms",
    "saved activations, MiB (mean / last epoch)",
    "local prefix, layers",
)


@dataclass(frozen=True)
class Run:
    """What a run directory says: its configuration, where it ran, and one entry per epoch."""

    config: RunConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.metrics[-1]


def read_run(path: Path) -> Run:
    """Raises ``ValueError`` if ``path`` holds no run or no finished epoch."""
    for name in (CONFIG, ENVIRONMENT):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a run directory (no {name})")
    metrics = read_metrics(path)
    if not metrics:
        raise ValueError(f"{path} has no finished epoch yet")
    return Run(RunConfig.from_json(read_json(path / CONFIG)), read_json(path / ENVIRONMENT), metrics)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (``None`` for a single value) and the values themselves."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything in the table as numbers. Differences and ratios to SGD are taken seed by seed."""
    by_method: dict[str, dict[int, Run]] = {}
    for run in runs:
        by_method.setdefault(run.config.method, {})[run.config.seed] = run
    baseline = by_method.get(BASELINE, {})
    rows = [_row(method, by_method[method], baseline) for method in METHODS if method in by_method]
    first = runs[0]
    about = ("data", "model", "epochs", "batch_size", "preset", "device", "amp", "channels_last")
    return {
        "benchmark": {
            **{name: getattr(first.config, name) for name in about},
            **{name: first.last[name] for name in ("train_images", "test_images")},
            **_growth(by_method),
        },
        "seeds": sorted({run.config.seed for run in runs}),
        "environment": {k: v for k, v in first.environment.items() if k != "command"},
        "methods": rows,
    }


def _growth(by_method: dict[str, dict[int, Run]]) -> dict[str, Any]:
    """What let batches grow and, of the methods that it holds for, the sizes that they had."""
    runs = {method: list(by_seed.values()) for method, by_seed in by_method.items()}
    growing = {method: mine for method, mine in runs.items() if mine[0].config.memory_budget is not None}
    if not growing:
        return {}
    config = next(iter(growing.values()))[0].config
    return {
        **{name: getattr(config, name) for name in ("memory_budget", "lr_scaling")},
        "batch_sizes": {m: sorted({e["batch_size"] for run in mine for e in run.metrics}) for m, mine in growing.items()},
    }


def _row(method: str, runs: dict[int, Run], baseline: dict[int, Run]) -> dict[str, Any]:
    paired = [(run, baseline[seed]) for seed, run in runs.items() if seed in baseline and method != BASELINE]
    everything = [m for run in runs.values() for m in run.metrics]
    last = [run.last for run in runs.values()]

    def accuracy(run: Run) -> float:
        return 100 * float(run.last["test_accuracy"])

    def seconds(run: Run) -> float:
        return float(run.last["elapsed_train_seconds"])

    def steps(run: Run) -> float:
        """Milliseconds of the run without what disturbed single steps."""
        return sum(_mini_batches(run, m) * float(sum(m["step_ms"].values())) for m in run.metrics)

    return {
        "method": method,
        "seeds": sorted(runs),
        "accuracy_percent": spread([accuracy(run) for run in runs.values()]),
        "minus_sgd_points": spread([accuracy(run) - accuracy(sgd) for run, sgd in paired]) if paired else None,
        "train_seconds": spread([seconds(run) for run in runs.values()]),
        "speed_up": spread([steps(sgd) / steps(run) for run, sgd in paired]) if paired else None,
        "step_ms": {phase: statistics.fmean(m["step_ms"][phase] for m in everything) for phase in PHASES},
        "last_step_ms": statistics.fmean(sum(m["step_ms"].values()) for m in last),
        "saved_mib_mean": statistics.fmean(m["saved_activation_bytes"] for m in everything) / 2**20,
        "saved_mib_last": statistics.fmean(m["saved_activation_bytes"] for m in last) / 2**20,
        "boundary": sorted({m["boundary"] for m in last}),
        "num_layers": last[0]["num_layers"],
    }


def _mini_batches(run: Run, epoch: dict[str, Any]) -> int:
    """Its steps. Runs from before the batch could grow do not say."""
    return int(epoch["mini_batches"] if "mini_batches" in epoch else epoch["train_images"] // run.config.batch_size)


def table(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows under :data:`HEADER`, as text."""
    return [
        (
            row["method"],
            _plus_minus(row["accuracy_percent"], 2),
            _plus_minus(row["minus_sgd_points"], 2, sign=True),
            _plus_minus(row["train_seconds"], 1),
            _plus_minus(row["speed_up"], 2, unit="x"),
            _phases(row["step_ms"]),
            f"{row['last_step_ms']:.1f}",
            f"{row['saved_mib_mean']:.1f} / {row['saved_mib_last']:.1f}",
            f"{'-'.join(map(str, sorted({row['boundary'][0], row['boundary'][-1]})))}/{row['num_layers']}",
        )
        for row in summary["methods"]
    ]


def caption(summary: dict[str, Any]) -> str:
    """What was run on what, in one line."""
    b, e, seeds = summary["benchmark"], summary["environment"], summary["seeds"]
    hardware = e["gpu"] or f"{e['cpu']}, {e['threads']} thread{'' if e['threads'] == 1 else 's'}"
    size = f"{b['train_images']} training and {b['test_images']} test pictures, "
    preset = "the paper's hyper-parameters, " if b["preset"] else ""
    kernels = "compiled kernels" if e["compiled_kernels"] else "PyTorch reference (no compiled kernels)"
    commit = f", commit {e['git_commit'][:9]}{'+' if e['git_commit'].endswith('+') else ''}" if e["git_commit"] else ""
    return (
        f"{b['model']} on {b['data']}: {size}{preset}{b['epochs']} epochs, {_batch(summary)}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; mean ± standard deviation over seeds, "
        f"accuracy after the last epoch. {hardware}; torch {e['torch']}, localsgd_ext {e['localsgd_ext']}{commit}, {kernels}."
    )


def _batch(summary: dict[str, Any]) -> str:
    """``batch 16``, and where it may have grown, to what: by method, if not all have the same."""
    b = summary["benchmark"]
    batch, sizes = f"batch {b['batch_size']}", b.get("batch_sizes", {})
    if not sizes:
        return batch
    by_largest: dict[int, list[str]] = {}
    for method, of_method in sizes.items():
        by_largest.setdefault(of_method[-1], []).append(method)
    rate = "" if b["lr_scaling"] == "none" else f", learning rate with it ({b['lr_scaling']})"
    limit = f"in {b['memory_budget'] / 2**20:.1f} MiB of each device{rate}"
    others = [row["method"] for row in summary["methods"] if row["method"] not in sizes]
    if len(by_largest) == 1 and not others:
        (largest,) = by_largest
        return f"{batch} ({'which did not grow' if largest == b['batch_size'] else f'grown to {largest}'} {limit})"
    grown = ", ".join(
        f"{' and '.join(methods)} {'not grown' if largest == b['batch_size'] else f'grown to {largest}'}"
        for largest, methods in by_largest.items()
    )
    rest = f"; {', '.join(others)} without a boundary: the same batch" if others else ""
    return f"{batch} ({grown} {limit}{rest})"


def markdown(summary: dict[str, Any]) -> str:
    """The table and its caption as Markdown."""
    rows = [HEADER, tuple("---" for _ in HEADER), *table(summary)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{caption(summary)}\n"


def show(summary: dict[str, Any], console: Any) -> None:
    """Print the table with rich, one block per method where the terminal is too narrow for columns."""
    from rich.table import Table

    rows = table(summary)
    if console.width >= 150:
        grid = Table(*HEADER)
        for row in rows:
            grid.add_row(*row)
    else:
        grid = Table("", *(row[0] for row in rows))
        for name, *cells in zip(HEADER[1:], *(row[1:] for row in rows), strict=True):
            grid.add_row(name, *cells)
    console.print(grid)
    console.print(caption(summary), highlight=False, soft_wrap=True)


def write(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Write ``table.json``, ``table.md``, ``picture.png`` and ``picture.svg`` to ``out``; returns the summary."""
    from localsgd_ext.train.picture import draw

    summary = summarize(runs)
    write_json(out / "table.json", summary)
    write_atomically(out / "table.md", markdown(summary).encode())
    for suffix, content in draw(runs, f"{summary['benchmark']['model']} on {summary['benchmark']['data']}").items():
        write_atomically(out / f"picture.{suffix}", content)
    return summary


def _phases(step_ms: dict[str, float]) -> str:
    return f"{sum(step_ms.values()):.1f} ({' + '.join(f'{step_ms[phase]:.1f}' for phase in PHASES)})"


def _plus_minus(value: dict[str, Any] | None, digits: int, *, sign: bool = False, unit: str = "") -> str:
    if value is None:
        return "-"
    text = f"{value['mean']:{'+' if sign else ''}.{digits}f}{unit}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"
