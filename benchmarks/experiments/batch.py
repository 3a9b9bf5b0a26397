"""Table 3 and the batch of figure 4: the batch of each device doubles where the boundary has freed the memory for it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import FREEZING, LITERAL, SGD, changed, difference, macs, relative
from benchmarks.experiments.report import spread
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, number, times

DOUBLES, GROWS = "batch doubles", "batch grows, learning rate with it"
PAPER = ("the paper's ResNet-50, 4 devices", 64, 90, 33)
"""Batch of each, epochs, and the epoch from which it is twice that."""


def variants(study: Study, network: Network) -> list[Variant]:
    """With the paper's recipe each device has the batch of one, and the learning rate is that many times as large (section 6.1);
    elsewhere they share the batch of one."""
    devices, config = study.scale.devices, study.config(network, "sgd")
    shared: dict[str, Any] = {}
    if study.scale.preset == "paper":
        shared = {"batch_size": config.batch_size * devices, "lr": config.lr * devices}
    batch = shared.get("batch_size", config.batch_size)
    twice = {"memory_budget": study.scale.device_memory, "max_batch_size": 2 * batch}
    more = {"memory_budget": study.scale.device_memory, "lr_scaling": "linear"}
    chosen = [
        SGD,
        FREEZING,
        changed(FREEZING, DOUBLES, **twice),
        LITERAL,
        changed(LITERAL, DOUBLES, **twice),
        changed(LITERAL, GROWS, **more),
    ]
    return [Variant(v.label, v.method, {**shared, **v.flags}, devices) for v in chosen]


def grown(study: Study, network: Network) -> list[Variant]:
    """Those whose batch was to grow, named for figure 4, whose other runs are of one device."""
    several = [v for v in variants(study, network) if v.flags.get("memory_budget") is not None and v.method == LITERAL.method]
    return [Variant(f"as trained: {v.label}", v.method, v.flags, v.processes) for v in several]


def device_batches(result: Result) -> list[int]:
    """Of each device, epoch by epoch."""
    return [size // result.processes for size in result.batches]


def course(batches: list[int]) -> str:
    """``64, 128 from epoch 33``."""
    parts = [str(batches[0])]
    parts += [f"{b} from epoch {epoch}" for epoch, (a, b) in enumerate(itertools.pairwise(batches), start=2) if a != b]
    return ", ".join(parts)


def courses(runs: Mapping[int, Result]) -> str:
    """Of all seeds, each that differs once."""
    return "; ".join(dict.fromkeys(course(device_batches(result)) for result in runs.values()))


def hours(result: Result) -> float:
    return result.hours


def mini_batches(result: Result) -> float:
    """Of the run; each ends in one reduction of gradients where there are several devices."""
    return float(sum(result.mini_batches))


def reductions(result: Result) -> float | None:
    """Of gradients in the run, as they were counted; ``None`` where there was one device."""
    return result.total("reductions") if result.processes > 1 else None


def reduced_bytes(result: Result) -> float | None:
    return result.total("reduced_bytes") if result.processes > 1 else None


def table(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    sgd = runs.get(SGD.label, {})
    rows: list[tuple[str, ...]] = [
        (
            "method", "seeds", "accuracy, %", "minus SGD, points", "batch of each device", "mini-batches an epoch, first and last",
            "reductions, % of SGD's", "MiB reduced, % of SGD's", "speed-up, multiply-adds", "speed-up, wall clock",
        )
    ]  # fmt: skip
    labels = [variant.label for variant in variants(study, network) if variant.label in runs]
    for label in labels:
        mine = runs[label]
        minus = difference(mine, sgd) if label != SGD.label else None
        shares = [relative(mine, sgd, cost) for cost in (reductions, reduced_bytes)]
        speed_ups = [None if not (share := relative(mine, sgd, cost)) else 1 / share for cost in (macs, hours)]
        ends = dict.fromkeys(f"{r.mini_batches[0]}, {r.mini_batches[-1]}" for r in mine.values())
        rows.append(
            (
                label,
                str(len(mine)),
                spread([result.accuracy for result in mine.values()]),
                "-" if minus is None else minus.text(),
                courses(mine),
                "; ".join(ends),
                *(number(None if share is None else 100 * share) for share in shares),
                *map(times, speed_ups),
            )
        )
    name, batch, epochs, doubled = PAPER
    share = ((doubled - 1) + (epochs - doubled + 1) / 2) / epochs
    rows.append(
        (name, "", "", "", f"{batch}, {2 * batch} from epoch {doubled}", "", f"{100 * share:.1f} (by arithmetic)", "", "", "")
    )
    parts = [aligned(rows)]
    for before in (FREEZING.label, LITERAL.label):
        for text in (DOUBLES, GROWS):
            after = f"{before}, {text}"
            saved = [relative(runs.get(after, {}), runs.get(before, {}), cost) for cost in (mini_batches, hours)]
            if all(share is not None for share in saved) and (gained := difference(runs[after], runs[before])) is not None:
                fewer, less = (f"{100 * (1 - share):.1f} %" for share in saved if share is not None)
                parts.append(
                    f"{after}, against {before}: {fewer} fewer mini-batches, {less} less wall-clock time, {gained.text()} points."
                )
    parts.append(
        f"{study.scale.devices} device{'s' if study.scale.devices > 1 else ''} of {study.scale.device_memory / 2**20:.1f} MiB each. "
        "A mini-batch ends in one reduction of gradients over the devices, in DistributedDataParallel's buckets; those of correlations are in "
        "the bytes. Wall clock as the runs went, not in turn: of use from a quiet machine only. Differences seed by seed: mean "
        "[95 % confidence interval] and p of the paired t-test."
    )
    return "\n\n".join(parts)


def mean_batches(runs: Mapping[int, Result]) -> list[float]:
    """Of each device, epoch by epoch, mean over the seeds."""
    return [statistics.fmean(values) for values in zip(*map(device_batches, runs.values()), strict=True)]
