"""The pictures of the figures, from finished runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.experiments import batch, overtime
from benchmarks.experiments.cells import Network
from benchmarks.experiments.experiment import Runs
from benchmarks.experiments.methods import FREEZING, LITERAL, REFRESH, SGD, changed, macs, relative, timed
from benchmarks.experiments.scales import Study
from benchmarks.experiments.timing import Timings
from benchmarks.experiments.tuning import SWEEP_ALPHAS, SWEEP_CAPS, cap_sweep, complete, lost, shift_sweep

COLOURS = {SGD.label: "#0072B2", FREEZING.label: "#E69F00", LITERAL.label: "#CC79A7", REFRESH.label: "#009E73"}
MARKS = {SGD.label: "o", FREEZING.label: "s", LITERAL.label: "v", REFRESH.label: "^"}


def drawn(count: int, draw: Callable[[Sequence[Any]], None], columns: int = 2) -> bytes:
    """A PNG of ``count`` panels, which ``draw`` fills."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, max(1, count))
    lines = -(-max(1, count) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.8 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    draw(axes)
    for axis in axes:
        axis.grid(color="#E0E0E0", lw=0.5)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
        else:
            axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _name(network: Network) -> str:
    return f"{network[1]} on {network[0]}"


def figure3(study: Study, networks: dict[Network, Runs], timings: Timings) -> bytes:
    def draw(axes: Sequence[Any]) -> None:
        for axis, (network, runs) in zip(axes, networks.items(), strict=False):
            for label in (v.label for v in overtime.variants(study, network)[1:] if v.label in runs):
                boundary = overtime.series(runs[label], "boundary")
                axis.step(range(1, len(boundary) + 1), boundary, where="mid", color=COLOURS[label], label=label)
            layers = next(iter(next(iter(runs.values())).values())).about["num_layers"]
            axis.set(xlabel="epoch", ylabel="layers before the boundary", ylim=(-0.3, layers), title=_name(network))

    return drawn(len(networks), draw)


def figure4(study: Study, networks: dict[Network, Runs], timings: Timings) -> bytes:
    def draw(axes: Sequence[Any]) -> None:
        for axis, (network, runs) in zip(axes, networks.items(), strict=False):
            for label in (v.label for v in overtime.variants(study, network) if v.label in runs):
                means = [value / overtime.MIB for value in overtime.mean_memory(runs[label])]
                axis.plot(range(1, len(means) + 1), means, MARKS[label] + "-", ms=4, color=COLOURS[label], label=label)
            axis.set(xlabel="epoch", ylabel="memory of a step, MiB", ylim=(0, None), title=_name(network))
        for axis, (network, runs) in zip(axes[len(networks) :], networks.items(), strict=False):
            for variant, dashes in zip(batch.grown(study, network), ("-", "--"), strict=True):
                if variant.label in runs:
                    sizes = batch.mean_batches(runs[variant.label])
                    axis.step(
                        range(1, len(sizes) + 1), sizes, dashes, where="mid", color=COLOURS[LITERAL.label], label=variant.label
                    )
            axis.set(xlabel="epoch", ylabel="batch of each device", ylim=(0, None), title=_name(network))

    return drawn(2 * len(networks), draw)


def figure5(study: Study, networks: dict[Network, Runs], timings: Timings) -> bytes:
    def draw(axes: Sequence[Any]) -> None:
        for axis, (network, runs) in zip(axes, networks.items(), strict=False):
            for method in (LITERAL, FREEZING, REFRESH):
                swept = [changed(method, f"alpha {alpha}", alpha=alpha) for alpha in SWEEP_ALPHAS]
                points = _points(runs, complete(study, runs, swept))
                if points:
                    x, y = zip(*sorted(points), strict=True)
                    axis.plot(x, y, MARKS[method.label], color=COLOURS[method.label], label=method.label)
            axis.set(xlabel="points lost against SGD", ylabel="speed-up, multiply-adds", title=_name(network))

    return drawn(len(networks), draw)


def _points(runs: Runs, labels: Sequence[str]) -> list[tuple[float, float]]:
    """Points lost and the speed-up."""
    shares = {label: relative(runs[label], runs[SGD.label], macs) for label in labels}
    return [(points, 1 / share) for label, share in shares.items() if share and (points := lost(runs, label)) is not None]


def figure6(study: Study, networks: dict[Network, Runs], timings: Timings) -> bytes:
    """Of each sweep, what is lost and what is saved."""
    sweeps = (("t_shift", study.scale.sweep_shifts, shift_sweep), ("l_max", SWEEP_CAPS, cap_sweep))

    def draw(axes: Sequence[Any]) -> None:
        panels = iter(axes)
        for network, runs in networks.items():
            name, cost = ("time", timings.steps_of_sgd) if timed(runs, timings) else ("multiply-adds", macs)
            for parameter, values, sweep in sweeps:
                losses, savings = next(panels), next(panels)
                for method in (LITERAL, REFRESH):
                    variants = sweep(study, method)
                    finished = set(complete(study, runs, variants))
                    swept = [(x, v.label) for x, v in zip(values, variants, strict=True) if v.label in finished]
                    saved = [(x, 100 * (1 - s)) for x, label in swept if (s := relative(runs[label], runs[SGD.label], cost))]
                    for axis, points in ((losses, [(x, lost(runs, label)) for x, label in swept]), (savings, saved)):
                        if points:
                            look = {"color": COLOURS[method.label], "label": method.label}
                            axis.plot(*zip(*points, strict=True), MARKS[method.label] + "-", **look)
                losses.set(xlabel=parameter, ylabel="points lost against SGD", title=_name(network))
                savings.set(xlabel=parameter, ylabel=f"{name} saved, % of SGD's", title=_name(network))

    return drawn(4 * len(networks), draw)
