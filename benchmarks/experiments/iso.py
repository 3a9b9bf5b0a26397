"""Table 6: what SGD would take to be as accurate, by training for fewer epochs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import (
    FREEZING,
    LITERAL,
    REFRESH,
    SGD,
    SMALL_STEPS,
    compared,
    macs,
    mean_accuracy,
    relative,
)
from benchmarks.experiments.scales import Study
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, number, times

SHARES = (7 / 8, 6 / 8, 5 / 8, 4 / 8)
METHODS = (LITERAL, SMALL_STEPS, FREEZING, REFRESH)


def shorter(study: Study, network: Network, shares: Sequence[float] = SHARES) -> dict[int, Variant]:
    """SGD with fewer epochs, the most first."""
    whole = study.epochs(network)
    fewer = sorted({round(share * whole) for share in shares} - {0, whole}, reverse=True)
    return {epochs: Variant(f"SGD, {epochs} epochs", "sgd", study.shortened(network, epochs)) for epochs in fewer}


def variants(study: Study, network: Network) -> list[Variant]:
    return [SGD, *shorter(study, network).values(), *METHODS]


def epochs_needed(curve: list[tuple[float, float]], accuracy: float) -> float | None:
    """The least number of epochs at which ``curve`` (epochs, accuracy), linear between its points, reaches ``accuracy``; ``None`` where
    it never does, or where its first point does already: fewer epochs might."""
    points = sorted(curve)
    if not points or points[0][1] >= accuracy:
        return None
    for (low, below), (high, above) in itertools.pairwise(points):
        if above >= accuracy:
            return low + (high - low) * (accuracy - below) / (above - below)
    return None


def table(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    whole = study.epochs(network)
    fewer = {epochs: variant.label for epochs, variant in shorter(study, network).items()} | {whole: SGD.label}
    rows: list[tuple[str, ...]] = [
        ("method", "accuracy, %", "SGD's epochs to it", f"speed-up over these, multiply-adds (of {whole} epochs)", "time")
    ]
    for label in (method.label for method in METHODS if method.label in runs):
        seeds = runs[label].keys()
        curve = [
            (float(epochs), statistics.fmean(runs[sgd][seed].accuracy for seed in seeds))
            for epochs, sgd in fewer.items()
            if seeds <= runs.get(sgd, {}).keys()
        ]
        needed = epochs_needed(curve, mean_accuracy(runs[label]))
        shares = [relative(runs[label], runs.get(SGD.label, {}), cost) for cost in (macs, timings.steps_of_sgd)]
        speed_ups = [None if needed is None or not share else needed / whole / share for share in shares]
        rows.append((label, f"{mean_accuracy(runs[label]):.2f}", number(needed), *map(times, speed_ups)))
    note = (
        "Epochs between those that were trained by linear interpolation of the mean accuracies of SGD's runs of the method's seeds; - where "
        "SGD's curve does not tell."
    )
    return f"{aligned(rows)}\n\n{note}\n\n{compared(runs, [v.label for v in variants(study, network)], timings)}"
