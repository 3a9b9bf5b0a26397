"""Accuracy against cost: every method at several costs, each against SGD with fewer epochs and against freezing at its own cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.experiments import methods, student
from benchmarks.experiments.cells import Network, Variant
from benchmarks.experiments.iso import shorter
from benchmarks.experiments.methods import Cost, difference, macs, percent, relative, saved_bytes, saved_bytes_at_the_end
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

Curve = Sequence[tuple[float, float]]
"""Cost and accuracy."""


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


def interpolated(curve: Curve, cost: float) -> float | None:
    """Along ``curve``, linearly between its points by cost; ``None`` outside of them."""
    points = sorted(curve)
    for (low, below), (high, above) in pairwise(points):
        if low <= cost <= high:
            return below if high == low else below + (above - below) * (cost - low) / (high - low)
    return None


def dominated(points: Mapping[str, tuple[float, float]]) -> dict[str, str | None]:
    """For each name of a cost and an accuracy: the most accurate one that costs no more and is better in one of both, if any."""
    found: dict[str, str | None] = {}
    for name, (cost, accuracy) in points.items():
        better = [
            (other[1], key)
            for key, other in points.items()
            if other[0] <= cost and other[1] >= accuracy and other != (cost, accuracy)
        ]
        found[name] = max(better)[1] if better else None
    return found


@dataclass(frozen=True)
class Points:
    """Finished runs of a network: label to seed to result, and which labels make up a curve."""

    curves: dict[str, list[str]]
    results: dict[str, dict[int, Result]]
    cost: Cost

    def curve(self, names: Sequence[str], seed: int) -> Curve:
        """Of one seed, from all labels of the curves ``names`` that it finished."""
        found = [self.results[label].get(seed) for name in names for label in self.curves[name] if label in self.results]
        return [(cost, r.accuracy) for r in found if r is not None and (cost := self.cost(r)) is not None]

    def mean(self, label: str) -> tuple[float, float] | None:
        """Cost and accuracy over the seeds."""
        found = [(cost, r.accuracy) for r in self.results[label].values() if (cost := self.cost(r)) is not None]
        return (statistics.fmean(c for c, _ in found), statistics.fmean(a for _, a in found)) if found else None

    def against(self, label: str, names: Sequence[str]) -> student.Paired | None:
        """``label`` minus the curve at its cost, seed by seed."""
        differences = []
        for seed, result in self.results[label].items():
            cost = self.cost(result)
            reference = None if cost is None else interpolated(self.curve(names, seed), cost)
            if reference is not None:
                differences.append(result.accuracy - reference)
        return student.paired(differences) if differences else None


def table(study: Study, network: Network, results: dict[str, dict[int, Result]], timings: Timings) -> str:
    """For one network: at equal multiply-adds and, where the steps were timed, at equal time."""
    curves = {name: [variant.label for variant in variants] for name, variants in families(study, network).items()}
    whole = curves[SGD][0]
    if whole not in results:
        return f"{whole} is missing: nothing to compare with."
    saved = "saved activations, % of SGD's, mean / last epoch"
    rows = [("run", "seeds", "accuracy, %", "minus SGD", "multiply-adds, % of SGD's", "time, % of SGD's", saved)]
    for label in (label for names in curves.values() for label in names if label in results):
        runs = results[label]
        minus = None if label == whole else difference(runs, results[whole])
        costs = (
            percent(relative(runs, results[whole], cost))
            for cost in (macs, timings.steps_of_sgd, saved_bytes, saved_bytes_at_the_end)
        )
        *shares, mean, last = costs
        accuracy = spread([r.accuracy for r in runs.values()])
        minus_sgd = "-" if minus is None else minus.text()
        rows.append((label, str(len(runs)), accuracy, minus_sgd, *shares, f"{mean} / {last}"))  # type: ignore[arg-type]
    parts = [aligned(rows), f"{methods.notes(results, timings)} {_slow_starts(results[whole])}"]
    for name, cost in (("multiply-adds", macs), ("time", timings.steps_of_sgd)):
        if all(cost(result) is not None for runs in results.values() for result in runs.values()):
            parts.append(_at_equal_cost(name, Points(curves, results, cost)))
    hebb = [
        (on, paired.text(), str(paired.n))
        for off, on in zip(*(curves[OURS[method]] for method in ("freeze", "local")), strict=False)
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


def _at_equal_cost(name: str, points: Points) -> str:
    better = dominated({label: point for label in points.results if (point := points.mean(label)) is not None})
    rows = [(f"at equal {name}", "minus SGD with fewer epochs", "minus freezing", "dominated by")]
    for curve, names in points.curves.items():
        for label in (label for label in names if label in points.results):
            against = (
                None if curve in (SGD, SHORT) else points.against(label, (SGD, SHORT)),
                None if curve in (SGD, SHORT, FROZEN) else points.against(label, (SGD, FROZEN)),
            )
            texts = ["-" if paired is None else paired.text() for paired in against]
            rows.append((label, texts[0], texts[1], better.get(label) or "none"))
    return aligned(rows)


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


def picture(study: Study, panels: Mapping[Network, dict[str, dict[int, Result]]]) -> bytes:
    """A panel for each network that SGD finished: mean accuracy and its 95 % interval against multiply-adds."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {network: results for network, results in panels.items() if methods.SGD.label in results}
    figure = Figure(figsize=(5.6 * max(1, len(panels)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axis, (network, results) in zip(axes, panels.items(), strict=False):
        curves = families(study, network)
        base = statistics.fmean(r.macs for r in results[curves[SGD][0].label].values())
        for name, variants in curves.items():
            shown = []
            ending = curves[SGD] if name in (SHORT, FROZEN) else []  # where these curves end
            for runs in (results[variant.label] for variant in (*ending, *variants) if variant.label in results):
                interval = student.paired([r.accuracy for r in runs.values()])
                reach = 0.0 if interval.high is None else interval.high - interval.mean
                shown.append((100 * statistics.fmean(r.macs for r in runs.values()) / base, interval.mean, reach))
            if shown:
                x, y, reaches = zip(*sorted(shown), strict=True)
                axis.errorbar(x, y, reaches, color=COLOURS[name], marker=MARKS[name], ms=5, lw=1, capsize=2, label=name)
        axis.set(
            xlabel="multiply-adds of the whole run, % of SGD's",
            ylabel="test accuracy, %",
            title=f"{network[1]} on {network[0]}",
        )
        axis.grid(color="#E0E0E0", lw=0.5)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, ncols=3, loc="outside upper center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
