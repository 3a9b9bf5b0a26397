"""What the hyper-parameters do: tables 4 and 7, figures 5 and 6, with the choices among runs that they rest on.

Choices are made by the accuracy on the test pictures, as the paper's are, so what is chosen looks a little better than it is; and among
settings that finished all seeds, so that none wins by which seeds it has.
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
    difference,
    macs,
    mean_accuracy,
    mean_cost,
    percent,
    relative,
    timed,
)
from benchmarks.experiments.scales import Study
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned, times
from localsgd_ext.train.presets import PAPER

ALPHAS, CAPS = (0.8, 0.95, 1.1), (0.5, 0.75)
BUDGETS = (0.05, 0.1, 0.25, 0.5, 1.0)
CURVE_BUDGETS = (0.1, 0.25, 0.5, 1.0, 1.5)
SWEEP_ALPHAS = (0.5, 0.8, 0.9, 0.95, 1.0, 1.5)
SWEEP_CAPS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
PAPER_ALPHA = PAPER["cifar10", "resnet18"].alpha  # the same everywhere
LOSS = 0.5  # points that table 4's choice may lose
ROUNDING = 1e-9  # of accuracies, as floats: what loses 0.05 points is within 0.05


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


def lost(runs: Runs, label: str) -> float | None:
    """Points of mean accuracy against SGD, over the seeds that both have; ``None`` where there are none."""
    minus = difference(runs.get(label, {}), runs.get(SGD.label, {}))
    return None if minus is None else 0.0 - minus.mean


def complete(study: Study, runs: Runs, variants: Iterable[Variant]) -> list[str]:
    """Those that, like SGD, finished all seeds of the study: what is chosen from. The paper's ``alpha`` comes first: ties go to it."""
    if not _all_seeds(study, runs, SGD.label):
        return []
    in_order = sorted(variants, key=lambda variant: variant.flags.get("alpha", PAPER_ALPHA) != PAPER_ALPHA)  # a stable sort
    return [variant.label for variant in in_order if _all_seeds(study, runs, variant.label)]


def _all_seeds(study: Study, runs: Runs, label: str) -> bool:
    return set(study.seed_range()) <= runs.get(label, {}).keys()


def fastest(runs: Runs, labels: Iterable[str], budget: float, cost: Cost = macs) -> str | None:
    """The cheapest of ``labels`` that loses no more than ``budget`` points, the first one of equals. All have the same seeds, and SGD."""
    allowed = {
        label: value
        for label in labels
        if (points := lost(runs, label)) is not None
        and points <= budget + ROUNDING
        and (value := mean_cost(runs[label], cost)) is not None
    }
    return min(allowed, key=allowed.__getitem__) if allowed else None


def best_within(runs: Runs, labels: Iterable[str], limit: float, cost: Cost = macs) -> str | None:
    """The most accurate of ``labels`` that costs no more than ``limit``, the first one of equals. All have the same seeds."""
    allowed = {
        label: mean_accuracy(runs[label])
        for label in labels
        if (value := mean_cost(runs[label], cost)) is not None and value <= limit
    }
    return max(allowed, key=allowed.__getitem__) if allowed else None


def _incomplete(study: Study, runs: Runs, variants: Iterable[Variant]) -> str:
    """What is not chosen from, as a sentence; empty if there is nothing."""
    listed = list(variants)
    missing = len(listed) - len(complete(study, runs, listed))
    return f" Not chosen from, for want of seeds (theirs or SGD's): {missing} of {len(listed)} settings." if missing else ""


def _twins(runs: Runs, label: str, labels: Iterable[str]) -> list[str]:
    """Others of ``labels`` whose runs are the same."""

    def numbers(of: str) -> dict[int, object]:
        return {seed: (result.accuracy, result.macs, result.boundaries) for seed, result in runs[of].items()}

    return [other for other in labels if other != label and numbers(other) == numbers(label)]


def _speed_ups(runs: Runs, label: str, timings: Timings) -> list[str]:
    shares = [relative(runs[label], runs[SGD.label], cost) for cost in (macs, timings.steps_of_sgd)]
    return [times(None if not share else 1 / share) for share in shares]


def table4(study: Study, networks: dict[Network, Runs], timings: Timings) -> dict[str, str]:
    """The first network's choice, for all, against each network's own."""
    settings = grid(study, LITERAL)
    labels = [variant.label for variant in settings]
    choices = {
        network: _choice(runs, complete(study, runs, settings)) for network, runs in networks.items() if SGD.label in runs
    }
    first = next(iter(study.networks("imagenet")), None)
    common = choices.get(first) if first is not None else None
    rows: list[tuple[str, ...]] = [
        ("network", "hyper-parameters", "minus SGD, points", "speed-up, multiply-adds", "speed-up, time", "which")
    ]
    told = {label: label.removeprefix(f"{LITERAL.label}, ") for label in labels}
    notes = [
        f"Chosen: the fewest multiply-adds among settings that lose at most {LOSS} points on average, or the most accurate if none does, seed "
        "by seed against SGD; of settings that make the same runs, the paper's alpha."
    ]
    for network, own in choices.items():
        runs = networks[network]
        for which, label in ((f"common: chosen on {first[1] if first else '-'}", common), ("its own", own)):
            if label is not None and (points := lost(runs, label)) is not None:
                rows.append((network[1], told[label], f"{0.0 - points:+.2f}", *_speed_ups(runs, label, timings), which))
        if own is not None and (same := _twins(runs, own, complete(study, runs, settings))):
            notes.append(f"{network[1]}, the same runs as {told[own]}: {'; '.join(told[label] for label in same)}.")
        if text := _incomplete(study, runs, settings):
            notes.append(f"{network[1]}:{text}")
    tables = {"": "\n\n".join([aligned(rows), " ".join(notes)])}
    for network, runs in networks.items():
        tables[f"{network[1]} on {network[0]}"] = compared(runs, [SGD.label, *labels], timings)
    return tables


def _choice(runs: Runs, labels: Sequence[str]) -> str | None:
    return fastest(runs, labels, LOSS) or best_within(runs, labels, float("inf"))


def table7(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    """For each budget LoCal+SGD's fastest run within it, and freezing's and refreshing's best in no more time: iso-runtime, as the paper
    has it, or no more multiply-adds where something was not timed."""
    if SGD.label not in runs:
        return f"{SGD.label} is missing: nothing to compare with."
    settings = {method.label: grid(study, method) for method in (LITERAL, FREEZING, REFRESH)}
    chosen = {name: complete(study, runs, variants) for name, variants in settings.items()}
    ours, *others = chosen
    in_time = all(
        mean_cost(runs[label], timings.steps_of_sgd) is not None for label in (SGD.label, *itertools.chain(*chosen.values()))
    )
    name, cost = ("time", timings.steps_of_sgd) if timed(runs, timings) and in_time else ("multiply-adds", macs)
    rows: list[tuple[str, ...]] = [("may lose, points", f"{ours}: lost", f"{name}, % of SGD's")]
    rows[0] += tuple(f"{other} at no more {name}: lost" for other in others)
    for budget in BUDGETS:
        label = fastest(runs, chosen[ours], budget, cost)
        if label is None:
            rows.append((f"{budget}", "no run within it", *["-"] * (1 + len(others))))
            continue
        limit = mean_cost(runs[label], cost)
        assert limit is not None  # it was chosen by it
        rivals = [best_within(runs, chosen[other], limit, cost) for other in others]
        cells = [percent(relative(runs[label], runs[SGD.label], cost))]
        cells += ["none that cheap" if rival is None else _shown(runs, rival) for rival in rivals]
        rows.append((f"{budget}", _shown(runs, label), *cells))
    everything = [variant for variants in settings.values() for variant in variants]
    made = len(settings[ours]) * len(study.seed_range())
    note = (
        f"At no more {name}{'' if name == 'time' else ': not all was timed'}. The rule is the printed one, local rate 0.01; with 1e-4, "
        f"where it does no harm (tables 1 and 2), the {len(settings[ours])} settings are {made} more runs of each network, which were "
        f"not made.{_incomplete(study, runs, everything)}"
    )
    every = compared(runs, [SGD.label, *(variant.label for variant in everything)], timings)
    return f"{aligned(rows)}\n\n{note}\n\n{every}"


def _shown(runs: Runs, label: str) -> str:
    points = lost(runs, label)
    return "-" if points is None else f"{points:.2f}"


def figure5(study: Study, network: Network, runs: Runs, timings: Timings) -> str:
    """The largest speed-up within each loss, over alpha."""
    if SGD.label not in runs:
        return f"{SGD.label} is missing: nothing to compare with."
    rows: list[tuple[str, ...]] = [("method", *(f"lost at most {budget}" for budget in CURVE_BUDGETS))]
    variants = figure5_variants(study, network)[1:]
    for method in (LITERAL, FREEZING, REFRESH):
        labels = complete(study, runs, [changed(method, f"alpha {alpha}", alpha=alpha) for alpha in SWEEP_ALPHAS])
        chosen = [fastest(runs, labels, budget) for budget in CURVE_BUDGETS]
        rows.append((method.label, *("-" if c is None else "/".join(_speed_ups(runs, c, timings)) for c in chosen)))
    note = f"Speed-up over SGD in multiply-adds / time, of the best alpha by multiply-adds.{_incomplete(study, runs, variants)}"
    every = compared(runs, [SGD.label, *(variant.label for variant in variants)], timings)
    return f"{aligned(rows)}\n\n{note}\n\n{every}"
