"""Figures 3 and 4: the boundary, the memory and the batch that fits, epoch by epoch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.experiments import batch as growing
from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import LITERAL, REFRESH, SGD
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, number

MIB = 2**20
SHOWN = 12  # epochs in a table at most


def variants(study: Study, network: Network) -> list[Variant]:
    return [SGD, LITERAL, REFRESH]


def figure4_variants(study: Study, network: Network) -> list[Variant]:
    """What would fit is reckoned for those of one device; the others were trained with a batch that grows."""
    return [*variants(study, network), *growing.grown(study, network)]


def chosen(epochs: int) -> list[int]:
    """Indices of the epochs that a table shows, first and last among them."""
    count = min(SHOWN, epochs)
    return sorted({round(i * (epochs - 1) / max(1, count - 1)) for i in range(count)})


def series(runs: Mapping[int, Result], name: str) -> list[float]:
    """A column, mean over the seeds."""
    return [statistics.fmean(values) for values in zip(*(result.epochs[name] for result in runs.values()), strict=True)]


def figure3(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    some = next(iter(runs.values()))
    layers = next(iter(some.values())).about["num_layers"]
    where = chosen(study.epochs(network))
    rows: list[tuple[str, ...]] = [(f"layers before the boundary, of {layers}; epoch", *(str(e + 1) for e in where))]
    for variant in variants(study, network)[1:]:
        if variant.label in runs:
            boundary = series(runs[variant.label], "boundary")
            rows.append((variant.label, *(f"{boundary[e]:.1f}" for e in where)))
    return f"{aligned(rows)}\n\nMean over the seeds."


def memory(result: Result) -> list[float]:
    """Of a step, epoch by epoch: the device's peak where there is one, else what is saved for the backward pass."""
    peaks = result.epochs["peak_device_bytes"]
    return [float(v) for v in (peaks if all(peaks) else result.epochs["saved_activation_bytes"])]


def largest_batch(batch: int, now: float, sgd: float) -> int:
    """The largest doubling of ``batch`` that needs no more than SGD's memory, which grows with it."""
    while 2 * now <= sgd:
        batch, now = 2 * batch, 2 * now
    return batch


def figure4(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    """Memory of a step and the batch that would fit, and the batch with which table 3's runs were made."""
    return "\n\n".join([*_reckoned(study, network, runs), *_trained(study, network, runs)])


def _reckoned(study: Study, network: Network, runs: Runs) -> list[str]:
    """Of one device."""
    if SGD.label not in runs:
        return [f"{SGD.label} is missing: nothing to compare with."]
    epochs = study.epochs(network)
    where = chosen(epochs)
    sgd = statistics.fmean(memory(result)[0] for result in runs[SGD.label].values())
    batch = next(iter(runs[SGD.label].values())).config.batch_size
    rows: list[tuple[str, ...]] = [("memory of a step, MiB (batch that fits in SGD's); epoch", *(str(e + 1) for e in where))]
    halves = []
    for label in (variant.label for variant in variants(study, network) if variant.label in runs):
        means = mean_memory(runs[label])
        rows.append((label, *(f"{means[e] / MIB:.1f} ({largest_batch(batch, means[e], sgd)})" for e in where)))
        half = next((e + 1 for e, value in enumerate(means) if 2 * value <= sgd), None)
        if label != SGD.label:
            halves.append(f"{label}: half of SGD's memory from epoch {half or '-'} of {epochs}.")
    return [aligned(rows), " ".join(halves)]


def _trained(study: Study, network: Network, runs: Runs) -> list[str]:
    """Of several devices."""
    labels = [variant.label for variant in growing.grown(study, network) if variant.label in runs]
    if not labels:
        return []
    where, devices = chosen(study.epochs(network)), study.scale.devices
    head = f"batch of each of {devices} device{'s' if devices > 1 else ''} of {study.scale.device_memory / MIB:.1f} MiB"
    rows: list[tuple[str, ...]] = [(f"{head} (memory of a step, MiB); epoch", *(str(e + 1) for e in where))]
    for label in labels:
        means, batches = mean_memory(runs[label]), growing.mean_batches(runs[label])
        rows.append((label, *(f"{number(batches[e])} ({means[e] / MIB:.1f})" for e in where)))
    return [aligned(rows), "Mean over the seeds."]


def mean_memory(runs: Mapping[int, Result]) -> list[float]:
    """Of a step, epoch by epoch, mean over the seeds."""
    return [statistics.fmean(values) for values in zip(*(memory(result) for result in runs.values()), strict=True)]
