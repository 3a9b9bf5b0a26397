"""Accuracy against cost: every method at several costs, each against SGD with fewer epochs and against freezing at its own cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.experiments import methods, student
from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.iso import shorter
from benchmarks.experiments.methods import Cost, difference, macs, percent, relative, saved_bytes, saved_bytes_at_the_end, timed
from benchmarks.experiments.report import spread
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result
from benchmarks.experiments.timing import Timings
from benchmarks.tables import aligned

REFRESHES = (
    ("quadratic", 4, 0.9), ("linear", 4, 0.9), ("linear", 2, 0.9), ("dynamic", 4, 0.9), ("quadratic", 4, 0.75), ("linear", 4, 0.75)
)  # fmt: skip
WITH_HEBB = 1  # of them, the first ones
SHARES = (7 / 8, 6 / 8, 5 / 8)  # of SGD's epochs
FREEZING = (("linear", 0.75), ("linear", 0.9), ("quadratic", 0.75), ("dynamic", 0.75), ("dynamic", 0.9))
BOTH = (("dynamic", 0.75, 7 / 8), ("dynamic", 0.75, 6 / 8), ("linear", 0.75, 7 / 8))
"""Freezing in a share of SGD's epochs."""
STILL = (("dynamic", 0.75, "freeze", "BN too"),)
"""Freezing in which the prefix's BatchNorm stands still too."""
AT_ONCE = (
    ("linear", 0, 0.75, 1),
    ("dynamic", 0, 0.75, 1),
    ("dynamic", 0, 0.75, 6 / 8),
    ("linear", 4, 0.9, 1),
    ("dynamic", 4, 0.9, 1),
)
"""Schedule, refresh, cap and share of SGD's epochs of what does not wait for the loss to fall."""
LITERAL = ("dynamic",)
SGD, SHORT, FROZEN = "SGD", "SGD, fewer epochs", "freezing"
FROZEN_SHORT, FROZEN_STILL, NOT_WAITING = "freezing, fewer epochs", "freezing, BN too", "not waiting"
OURS = {"freeze": "refresh", "local": "refresh + Hebb"}
PAPER_RULE = "literal LoCal+SGD"

Point = tuple[float, float]
"""Cost and accuracy."""
Seeded = dict[int, Point]
"""By seed."""


def families(study: Study, network: Network) -> dict[str, list[Variant]]:
    """The curves, by name."""
    curves = {
        SGD: [methods.SGD],
        SHORT: list(shorter(study, network, SHARES).values()),
        FROZEN: [
            Variant(f"{FROZEN}, {schedule} to {100 * l_max:.0f} %", "freeze", {"schedule": schedule, "l_max": l_max})
            for schedule, l_max in FREEZING
        ],
        FROZEN_SHORT: [
            Variant(
                f"{FROZEN}, {schedule} to {100 * l_max:.0f} %, {epochs} epochs",
                "freeze",
                {"schedule": schedule, "l_max": l_max, **study.shortened(network, epochs)},
            )
            for schedule, l_max, share in BOTH
            for epochs in (round(share * study.epochs(network)),)
        ],
        FROZEN_STILL: [
            Variant(
                f"{FROZEN}, {text}, {schedule} to {100 * l_max:.0f} %",
                "freeze",
                {"schedule": schedule, "l_max": l_max, "bn_stats": bn_stats},
            )
            for schedule, l_max, bn_stats, text in STILL
        ],
        NOT_WAITING: [
            Variant(
                f"{name}, {schedule} to {100 * l_max:.0f} %{f', {epochs} epochs' if share < 1 else ''}, {NOT_WAITING}",
                "freeze",
                {
                    "schedule": schedule,
                    "l_max": l_max,
                    "min_loss_drop": 0.0,
                    **({"refresh": refresh} if refresh else {}),
                    **study.shortened(network, epochs),
                },
            )
            for schedule, refresh, l_max, share in (
                AT_ONCE if study.scale.preset != "paper" else ()
            )  # which does not wait anyhow
            for name in (f"{OURS['freeze']} 1/{refresh}" if refresh else FROZEN,)
            for epochs in (round(share * study.epochs(network)),)
        ],
        PAPER_RULE: [Variant(f"{PAPER_RULE}, {schedule}", "local-paper", {"schedule": schedule}) for schedule in LITERAL],
    }
    for method, name in OURS.items():
        rate = methods.SMALL_STEPS.flags if method == "local" else {}
        chosen = REFRESHES[:WITH_HEBB] if method == "local" else REFRESHES
        curves[name] = [
            Variant(
                f"{name} 1/{refresh}, {schedule} to {100 * l_max:.0f} %",
                method,
                {"schedule": schedule, "refresh": refresh, "l_max": l_max, **rate},
            )
            for schedule, refresh, l_max in chosen
        ]
    return curves


def variants(study: Study, network: Network) -> list[Variant]:
    return [variant for curve in families(study, network).values() for variant in curve]


def interpolated(curve: Sequence[Point], cost: float) -> float | None:
    """Along ``curve``, linearly between its points by cost; ``None`` outside of them."""
    points = sorted(curve)
    for (low, below), (high, above) in pairwise(points):
        if low <= cost <= high:
            return below if high == low else below + (above - below) * (cost - low) / (high - low)
    return None


def mean(points: Seeded, seeds: Collection[int]) -> Point:
    return statistics.fmean(points[seed][0] for seed in seeds), statistics.fmean(points[seed][1] for seed in seeds)


def dominates(one: Point, other: Point) -> bool:
    """Costs no more, is no less accurate, and better in one of both."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def frontier(points: Mapping[str, Seeded], seeds: Collection[int]) -> list[str]:
    """Of the rows that finished all of ``seeds``, those that no other dominates by the means over them."""
    means = {label: mean(mine, seeds) for label, mine in points.items() if all(seed in mine for seed in seeds)}
    return [label for label, point in means.items() if not any(dominates(other, point) for other in means.values())]


def against(points: Mapping[str, Seeded], label: str, baseline: Iterable[str]) -> student.Paired | None:
    """``label`` minus the frontier of the rows ``baseline`` at its cost, seed by seed. Left out of it are rows that are itself in all
    but name: half of whose runs, or more, are the same (what does not wait, where the loss falls in time)."""
    mine = points[label]
    others = {
        name: points[name]
        for name in baseline
        if name in points and 2 * sum(points[name].get(seed) == point for seed, point in mine.items()) < len(mine)
    }
    best = frontier(others, mine.keys())
    differences = []
    for seed, (cost, accuracy) in mine.items():
        reference = interpolated([others[name][seed] for name in best], cost)
        if reference is not None:
            differences.append(accuracy - reference)
    return student.paired(differences) if differences else None


def dominated(points: Mapping[str, Seeded]) -> dict[str, str]:
    """For each row the one that dominates it by the most, by the means over their common seeds, of which there must be
    :data:`student.LEAST`; ``"none"``; or ``"-"`` where there is no row to compare it with."""
    found: dict[str, str] = {}
    for label, mine in points.items():
        gains: dict[str, float] = {}
        found[label] = "-"
        for other, theirs in points.items():
            seeds = mine.keys() & theirs.keys()
            if other == label or len(seeds) < student.LEAST:
                continue
            found[label] = "none"
            here, there = mean(mine, seeds), mean(theirs, seeds)
            if dominates(there, here):
                gains[other] = there[1] - here[1]
        if gains:
            found[label] = max(gains, key=gains.__getitem__)
    return found


def priced(results: Runs, cost: Cost) -> dict[str, Seeded]:
    """Of the rows whose cost is known for all of their runs."""
    found: dict[str, Seeded] = {}
    for label, runs in results.items():
        costs = {seed: cost(result) for seed, result in runs.items()}
        if None not in costs.values():
            found[label] = {seed: (costs[seed], result.accuracy) for seed, result in runs.items()}  # type: ignore[misc]
    return found


def costs_of(results: Runs, timings: Timings) -> dict[str, Cost]:
    """By name; time where there is any."""
    return {"multiply-adds": macs, **({"time": timings.steps_of_sgd} if timed(results, timings) else {})}


def table(study: Study, network: Network, results: Runs, timings: Timings) -> str:
    """For one network: at equal multiply-adds and, where steps were timed, at equal time."""
    curves = families(study, network)
    whole = curves[SGD][0].label
    if whole not in results:
        return f"{whole} is missing: nothing to compare with."
    saved = "saved activations, % of SGD's, mean / last epoch"
    rows = [("run", "seeds", "accuracy, %", "minus SGD", "multiply-adds, % of SGD's", "time, % of SGD's", saved)]
    for label in (variant.label for variants in curves.values() for variant in variants if variant.label in results):
        runs = results[label]
        minus = None if label == whole else difference(runs, results[whole])
        costs = (
            percent(relative(runs, results[whole], cost))
            for cost in (macs, timings.steps_of_sgd, saved_bytes, saved_bytes_at_the_end)
        )
        *shares, mean_share, last = costs
        accuracy = spread([r.accuracy for r in runs.values()])
        minus_sgd = "-" if minus is None else minus.text()
        rows.append((label, str(len(runs)), accuracy, minus_sgd, *shares, f"{mean_share} / {last}"))  # type: ignore[arg-type]
    parts = [aligned(rows), f"{methods.notes(results, timings)} {_slow_starts(results[whole])}"]
    parts += [_at_equal_cost(name, curves, results, cost) for name, cost in costs_of(results, timings).items()]
    parts.append(EQUAL_COST)
    hebb = [
        (on, paired.text(), str(paired.n))
        for off, on in zip(*([v.label for v in curves[OURS[method]]] for method in ("freeze", "local")), strict=False)
        if off in results and on in results and (paired := difference(results[on], results[off])) is not None
    ]
    if hebb:
        parts.append(aligned([("Hebb on minus off, same schedule and refresh", "accuracy, points", "seeds"), *hebb]))
    return "\n\n".join(parts)


def _slow_starts(runs: Mapping[int, Result]) -> str:
    """What waiting for the loss to fall is about."""
    losses = {seed: r.epochs["train_loss"] for seed, r in runs.items()}
    slow = sorted(seed for seed, (first, *rest) in losses.items() if any(loss > 0.9 * first for loss in rest[:1]))
    named = f" ({', '.join(map(str, slow))})" if slow else ""
    return f"The loss of SGD's second epoch was within a tenth of the first one's in {len(slow)} of {len(runs)} seeds{named}."


EQUAL_COST = (
    "At equal cost: minus the frontier of SGD with fewer epochs, and that of all other rows that only freeze (less than half of whose "
    "runs are the same ones); SGD is an end of both, unless a row dominates it. A frontier has the rows that finished all of the "
    "method's seeds and that no other one dominates by the means over these; a seed's reference is interpolated linearly between its own "
    "points there. Seeds whose cost these "
    "do not reach have none; where that is so, the seeds left are counted. Chosen by the very runs that are compared, the frontiers look "
    "a little better than they are. Dominated by: a row that costs no more and is no less accurate, by the means over common seeds "
    f"(- with fewer than {student.LEAST}). No p is corrected for the number of rows."
)


def _at_equal_cost(name: str, curves: Mapping[str, Sequence[Variant]], results: Runs, cost: Cost) -> str:
    points = priced(results, cost)
    better = dominated(points)
    variants = [variant for curve in curves.values() for variant in curve]
    sgd = [variant.label for variant in variants if variant.method == "sgd"]
    frozen = [curves[SGD][0].label, *(v.label for v in variants if v.method == "freeze" and not v.flags.get("refresh"))]
    rows = [(f"at equal {name}", "minus SGD with fewer epochs", "minus freezing", "dominated by")]
    for variant in (variant for variant in variants if variant.label in results):
        label = variant.label
        if label not in points:
            rows.append((label, "-", "-", "-"))
        elif variant.method == "sgd":
            rows.append((label, "-", "-", better[label]))
        else:
            texts = [_told(against(points, label, baseline), len(points[label])) for baseline in (sgd, frozen)]
            rows.append((label, texts[0], texts[1], better[label]))
    missing = [label for label in results if label not in points]
    return aligned(rows) + (f"\n\nWithout {name}: {'; '.join(missing)}." if missing else "")


def _told(paired: student.Paired | None, seeds: int) -> str:
    if paired is None:
        return "-"
    return paired.text() + (f" ({paired.n} seeds)" if student.LEAST <= paired.n < seeds else "")


COLOURS = {
    SGD: "#000000", SHORT: "#0072B2", FROZEN: "#E69F00", FROZEN_SHORT: "#B8860B", FROZEN_STILL: "#56B4E9",
    NOT_WAITING: "#999999", PAPER_RULE: "#CC79A7",
    OURS["freeze"]: "#009E73", OURS["local"]: "#D55E00"
}  # fmt: skip
MARKS = {
    SGD: "*",
    SHORT: "o",
    FROZEN: "s",
    FROZEN_SHORT: "P",
    FROZEN_STILL: "X",
    NOT_WAITING: "x",
    PAPER_RULE: "v",
    OURS["freeze"]: "^",
    OURS["local"]: "D",
}


def picture(study: Study, panels: Mapping[Network, Runs], timings: Timings) -> bytes:
    """A line for each network that SGD finished: mean accuracy and its 95 % interval against multiply-adds and, where steps were timed,
    time."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {
        (network, name): (results, cost)
        for network, results in panels.items()
        if methods.SGD.label in results
        for name, cost in costs_of(results, timings).items()
    }
    columns = max(1, len({name for _, name in shown}))
    lines = max(1, len({network for network, _ in shown}))
    figure = Figure(figsize=(5.6 * columns, 4.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False)
    rows = list(dict.fromkeys(network for network, _ in shown))
    for (network, name), (results, cost) in shown.items():
        axis = places[rows.index(network)][0 if name == "multiply-adds" else 1]
        _draw(axis, study, network, results, cost)
        axis.set_xlabel(f"{name} of the whole run, % of SGD's")
    for axis in figure.axes:
        axis.set_visible(axis.has_data())
    named = {name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), fontsize=8, ncols=3, loc="outside upper center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(axis: Any, study: Study, network: Network, results: Runs, cost: Cost) -> None:
    """The literal rule may be so far below that the others are all one: their range is what is shown."""
    curves = families(study, network)
    sgd = curves[SGD][0].label
    points = priced(results, cost)
    ends: list[float] = []  # of the intervals
    for name, variants in curves.items():
        drawn = []
        ending = curves[SGD] if name in (SHORT, FROZEN) else []  # where these curves end
        for label in (variant.label for variant in (*ending, *variants) if variant.label in points):
            if (share := relative(results[label], results[sgd], cost)) is not None:
                interval = student.paired([accuracy for _, accuracy in points[label].values()])
                drawn.append((100 * share, interval.mean, 0.0 if interval.high is None else interval.high - interval.mean))
        if drawn:
            x, y, reaches = zip(*sorted(drawn), strict=True)
            axis.errorbar(x, y, reaches, color=COLOURS[name], marker=MARKS[name], ms=5, lw=1, capsize=2, label=name)
            if name != PAPER_RULE:
                ends += [accuracy + sign * reach for accuracy, reach in zip(y, reaches, strict=True) for sign in (-1, 1)]
    low, high = (min(ends), max(ends)) if ends else (-math.inf, math.inf)
    for label in (variant.label for variant in curves[PAPER_RULE] if variant.label in points):
        below = statistics.fmean(accuracy for _, accuracy in points[label].values())
        share = relative(results[label], results[sgd], cost)
        if below < low and share is not None:
            axis.annotate(
                f"↓ {below:.1f} %", (100 * share, 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
                fontsize=8, color=COLOURS[PAPER_RULE]
            )  # fmt: skip
    if ends:
        margin = 0.05 * (high - low) + 0.01
        axis.set_ylim(low - margin, high + margin)
    axis.set(ylabel="test accuracy, %", title=f"{network[1]} on {network[0]}")
    axis.grid(color="#E0E0E0", lw=0.5)
