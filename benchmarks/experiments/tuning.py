"""What the hyper-parameters do: tables 4 and 7, figures 5 and 6, with the choices among runs that they rest on.

Choices are made by the accuracy on the test pictures, as the paper's are, so what is chosen looks a little better than it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import (
    FREEZING,
    LITERAL,
    REFRESH,
    SGD,
    Cost,
    changed,
    compared,
    macs,
    mean_accuracy,
    mean_cost,
    percent,
    relative,
)
from benchmarks.experiments.scales import Study
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, times

ALPHAS, CAPS = (0.8, 0.95, 1.1), (0.5, 0.75)
BUDGETS = (0.05, 0.1, 0.25, 0.5, 1.0)
CURVE_BUDGETS = (0.1, 0.25, 0.5, 1.0, 1.5)
SWEEP_ALPHAS = (0.5, 0.8, 0.9, 0.95, 1.0, 1.5)
SWEEP_CAPS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
LOSS = 0.5  # points that table 4's choice may lose


def grid(study: Study, method: Variant) -> list[Variant]:
    return [
        changed(method, f"alpha {alpha}, t_shift {shift}, l_max {cap}", alpha=alpha, t_shift=shift, l_max=cap)
        for alpha, shift, cap in itertools.product(ALPHAS, study.scale.grid_shifts, CAPS)
    ]


def table4_variants(study: Study, network: Network) -> list[Variant]:
    return [SGD, *grid(study, LITERAL)]


def table7_variants(study: Study, network: Network) -> list[Variant]:
    return [SGD, *grid(study, LITERAL), *grid(study, FREEZING), *grid(study, REFRESH)]


def figure5_variants(study: Study, network: Network) -> list[Variant]:
    methods = (LITERAL, FREEZING, REFRESH)
    return [SGD, *(changed(method, f"alpha {alpha}", alpha=alpha) for method in methods for alpha in SWEEP_ALPHAS)]


def shift_sweep(study: Study, method: Variant) -> list[Variant]:
    return [changed(method, f"t_shift {shift}", t_shift=shift) for shift in study.scale.sweep_shifts]


def cap_sweep(study: Study, method: Variant) -> list[Variant]:
    return [changed(method, f"l_max {cap}", l_max=cap) for cap in SWEEP_CAPS]


def figure6_variants(study: Study, network: Network) -> list[Variant]:
    return [SGD, *(v for method in (LITERAL, REFRESH) for v in (*shift_sweep(study, method), *cap_sweep(study, method)))]


def lost(runs: Runs, label: str) -> float:
    """Points of mean accuracy against SGD."""
    return mean_accuracy(runs[SGD.label]) - mean_accuracy(runs[label])


def fastest(runs: Runs, labels: Iterable[str], budget: float, cost: Cost = macs) -> str | None:
    """The cheapest of ``labels`` that loses no more than ``budget`` points."""
    allowed = [
        (value, label)
        for label in labels
        if label in runs and lost(runs, label) <= budget and (value := mean_cost(runs[label], cost)) is not None
    ]
    return min(allowed)[1] if allowed else None


def best_within(runs: Runs, labels: Iterable[str], limit: float, cost: Cost = macs) -> str | None:
    """The most accurate of ``labels`` that costs no more than ``limit``."""
    allowed = [
        (mean_accuracy(runs[label]), label)
        for label in labels
        if label in runs and (value := mean_cost(runs[label], cost)) is not None and value <= limit
    ]
    return max(allowed)[1] if allowed else None


def _speed_ups(runs: Runs, label: str, timings: Timings) -> list[str]:
    shares = [relative(runs[label], runs[SGD.label], cost) for cost in (macs, timings.steps_of_sgd)]
    return [times(None if not share else 1 / share) for share in shares]


def table4(study: Study, networks: dict[Network, Runs], timings: Timings) -> dict[str, str]:
    """The first network's choice, for all, against each network's own."""
    labels = [variant.label for variant in grid(study, LITERAL)]
    choices = {network: _choice(runs, labels) for network, runs in networks.items() if SGD.label in runs}
    first = next(iter(study.networks("imagenet")), None)
    common = choices.get(first) if first is not None else None
    rows: list[tuple[str, ...]] = [
        ("network", "hyper-parameters", "minus SGD, points", "speed-up, multiply-adds", "speed-up, time", "which")
    ]
    for network, own in choices.items():
        runs = networks[network]
        for which, label in ((f"common: chosen on {first[1] if first else '-'}", common), ("its own", own)):
            if label is not None and label in runs:
                told = label.removeprefix(f"{LITERAL.label}, ")
                rows.append((network[1], told, f"{0.0 - lost(runs, label):+.2f}", *_speed_ups(runs, label, timings), which))
    note = f"Chosen: the fewest multiply-adds among runs that lose at most {LOSS} points on average, or the most accurate if none does."
    tables = {"": f"{aligned(rows)}\n\n{note}"}
    for network, runs in networks.items():
        tables[f"{network[1]} on {network[0]}"] = compared(runs, [SGD.label, *labels], timings)
    return tables


def _choice(runs: Runs, labels: Sequence[str]) -> str | None:
    return fastest(runs, labels, LOSS) or best_within(runs, labels, float("inf"))


def table7(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    """For each budget LoCal+SGD's fastest run within it, and freezing's and refreshing's best at no more multiply-adds."""
    if SGD.label not in runs:
        return f"{SGD.label} is missing: nothing to compare with."
    ours, others = (
        [v.label for v in grid(study, LITERAL)],
        {m.label: [v.label for v in grid(study, m)] for m in (FREEZING, REFRESH)},
    )
    rows: list[tuple[str, ...]] = [("may lose, points", f"{LITERAL.label}: lost", "multiply-adds, % of SGD's")]
    rows[0] += tuple(f"{name} at no more multiply-adds: lost" for name in others)
    for budget in BUDGETS:
        label = fastest(runs, ours, budget)
        if label is None:
            rows.append((f"{budget}", "no run within it", *["-"] * (1 + len(others))))
            continue
        limit = mean_cost(runs[label], macs)
        assert limit is not None  # it was chosen by it
        rivals = [best_within(runs, labels, limit) for labels in others.values()]
        rows.append(
            (
                f"{budget}",
                f"{lost(runs, label):.2f}",
                percent(relative(runs[label], runs[SGD.label], macs)),
                *("none that cheap" if rival is None else f"{lost(runs, rival):.2f}" for rival in rivals),
            )
        )
    everything = compared(runs, [SGD.label, *ours, *(label for labels in others.values() for label in labels)], timings)
    return f"{aligned(rows)}\n\n{everything}"


def figure5(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    """The largest speed-up within each loss, over alpha."""
    if SGD.label not in runs:
        return f"{SGD.label} is missing: nothing to compare with."
    rows: list[tuple[str, ...]] = [("method", *(f"lost at most {budget}" for budget in CURVE_BUDGETS))]
    for method in (LITERAL, FREEZING, REFRESH):
        labels = [changed(method, f"alpha {alpha}").label for alpha in SWEEP_ALPHAS]
        chosen = [fastest(runs, labels, budget) for budget in CURVE_BUDGETS]
        rows.append((method.label, *("-" if c is None else "/".join(_speed_ups(runs, c, timings)) for c in chosen)))
    note = "Speed-up over SGD in multiply-adds / time, of the best alpha."
    every = compared(runs, [variant.label for variant in figure5_variants(study, network)], timings)
    return f"{aligned(rows)}\n\n{note}\n\n{every}"
