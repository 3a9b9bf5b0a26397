"""The methods that are compared, and the table that compares them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.experiments import student
from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.report import interval_note, spread
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, number, times

Cost = Callable[[Result], float | None]

SGD = Variant("SGD", "sgd")
STOCHASTIC_DEPTH = Variant("stochastic depth", "stochastic-depth")
PRUNING = Variant("pruning during training", "prunetrain")
FREEZING = Variant("freezing", "freeze")
LITERAL = Variant("LoCal+SGD, literal", "local-paper")
SMALL_STEPS = Variant("LoCal+SGD, local rate 1e-4", "local", {"local_lr": 1e-4})
REFRESH = Variant("refresh 1/4", "freeze", {"refresh": 4})
REFRESH_HEBB = Variant("refresh 1/4 + Hebb", "local", {"refresh": 4, "local_lr": 1e-4})
RESIDUAL = ("resnet", "mobilenet")


def changed(variant: Variant, text: str, **flags: Any) -> Variant:
    """``variant`` with other options, called ``label, text``."""
    return Variant(f"{variant.label}, {text}", variant.method, {**variant.flags, **flags})


def all_methods(study: Study, network: Network) -> list[Variant]:
    """Tables 1 and 2. Stochastic depth needs residual blocks."""
    depth = [STOCHASTIC_DEPTH] if any(name in network[1] for name in RESIDUAL) else []
    return [SGD, *depth, PRUNING, FREEZING, LITERAL, SMALL_STEPS, REFRESH, REFRESH_HEBB]


def macs(result: Result) -> float | None:
    return result.macs


def saved_bytes(result: Result) -> float | None:
    """For the backward pass, mean over the epochs."""
    return statistics.fmean(result.epochs["saved_activation_bytes"])


def saved_bytes_at_the_end(result: Result) -> float | None:
    """The same in the last epoch."""
    return result.epochs["saved_activation_bytes"][-1]


def mean_cost(runs: Mapping[int, Result], cost: Cost) -> float | None:
    """Over the seeds; ``None`` where it is not known for all."""
    costs = [value for result in runs.values() if (value := cost(result)) is not None]
    return statistics.fmean(costs) if costs and len(costs) == len(runs) else None


def mean_accuracy(runs: Mapping[int, Result]) -> float:
    return statistics.fmean(result.accuracy for result in runs.values())


def relative(runs: Mapping[int, Result], sgd: Mapping[int, Result], cost: Cost) -> float | None:
    """Mean cost over the seeds that both have, of that of ``sgd``; ``None`` where it is not known."""
    mine, theirs = (mean_cost({seed: one[seed] for seed in runs.keys() & sgd.keys()}, cost) for one in (runs, sgd))
    return None if mine is None or not theirs else mine / theirs


def timed(runs: Runs, timings: Timings) -> bool:
    """Whether steps of this network were."""
    return any(timings.sgd_ms(result.config) is not None for mine in runs.values() for result in mine.values())


def difference(one: Mapping[int, Result], other: Mapping[int, Result]) -> student.Paired | None:
    """Of the accuracies, over the seeds that both have."""
    both = sorted(one.keys() & other.keys())
    return student.paired([one[seed].accuracy - other[seed].accuracy for seed in both]) if both else None


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def prefix(runs: Mapping[int, Result]) -> str:
    """Layers in the prefix in the last epoch, the smallest and the largest over seeds, of all."""
    last = sorted(result.boundaries[-1] for result in runs.values())
    layers = next(iter(runs.values())).about["num_layers"]
    return f"{last[0]}/{layers}" if last[0] == last[-1] else f"{last[0]}-{last[-1]}/{layers}"


HEADER = (
    "method", "seeds", "accuracy, %", "minus SGD, points", "speed-up, multiply-adds", "speed-up, time",
    "saved activations, % of SGD's", "prefix at the end"
)  # fmt: skip


def compared(runs: Runs, labels: Sequence[str], timings: Timings, baseline: str = SGD.label) -> str:
    """Accuracy and cost of those of ``labels`` that finished."""
    sgd = runs.get(baseline, {})
    rows: list[tuple[str, ...]] = [HEADER]
    for label in (label for label in labels if label in runs):
        mine = runs[label]
        minus = difference(mine, sgd) if label != baseline else None
        speed_ups = [None if not (share := relative(mine, sgd, cost)) else 1 / share for cost in (macs, timings.steps_of_sgd)]
        rows.append(
            (
                label,
                str(len(mine)),
                spread([result.accuracy for result in mine.values()]),
                "-" if minus is None else minus.text(),
                *map(times, speed_ups),
                percent(relative(mine, sgd, saved_bytes)),
                prefix(mine),
            )
        )
    return f"{aligned(rows)}\n\n{notes(runs, timings)}"


def notes(runs: Runs, timings: Timings) -> str:
    """What stands below a table of accuracies and costs."""
    some = next((result for mine in runs.values() for result in mine.values()), None)
    milliseconds = None if some is None else timings.sgd_ms(some.config)
    step = "" if milliseconds is None else f" A step of SGD took {number(milliseconds)} ms, without the loading of data."
    return interval_note() + step


def comparison(
    variants: Callable[[Study, Network], list[Variant]],
) -> Callable[[Study, Network, Runs, Timings], str]:
    """The table of all ``variants`` of a network."""

    def table(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
        return compared(runs, [variant.label for variant in variants(study, network)], timings)

    return table
