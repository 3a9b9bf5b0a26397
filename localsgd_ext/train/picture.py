"""One picture of a comparison: accuracy over time, the boundary (paper, figure 3) and the memory (figure 4) over epochs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from localsgd_ext.train.config import METHODS, RunConfig

if TYPE_CHECKING:
    from localsgd_ext.train.report import Run

# Okabe and Ito's palette: told apart with any colour vision; line styles and markers tell them apart in grey.
_STYLE = {
    "sgd": {"color": "#0072B2", "linestyle": "-", "linewidth": 2.0, "marker": "o"},
    "freeze": {"color": "#E69F00", "linestyle": "-", "linewidth": 4.5, "marker": "s"},  # wide: local often lies on top of it
    "refresh": {"color": "#000000", "linestyle": "--", "linewidth": 2.0, "marker": "X"},
    "local": {"color": "#009E73", "linestyle": "-", "linewidth": 1.8, "marker": "^"},
    "local-paper": {"color": "#CC79A7", "linestyle": "--", "linewidth": 1.8, "marker": "D"},
    "stochastic-depth": {"color": "#D55E00", "linestyle": "-.", "linewidth": 1.8, "marker": "v"},
    "prunetrain": {"color": "#56B4E9", "linestyle": ":", "linewidth": 2.2, "marker": "P"},
}


def draw(runs: Sequence[Run], title: str) -> dict[str, bytes]:
    """The picture as ``{"png": ..., "svg": ...}``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and pyplot's global state is left alone
    time_axis, boundary_axis, memory_axis = figure.subplots(1, 3)
    methods = [m for m in METHODS if any(run.config.method == m for run in runs)]
    for method in methods:
        mine = [run for run in runs if run.config.method == method]
        name = _name(mine[0].config)
        many = max(len(run.metrics) for run in mine) > 30
        style = {**_STYLE[method], "markersize": 0 if many else 5}
        epochs = _series(mine, lambda m: m["epoch"])[0]

        accuracy = 100 * _series(mine, lambda m: m["test_accuracy"])
        seconds = _series(mine, lambda m: m["elapsed_train_seconds"]).mean(axis=0)
        time_axis.plot(seconds, accuracy.mean(axis=0), label=name, **style)
        if len(mine) > 1:
            time_axis.fill_between(seconds, accuracy.min(axis=0), accuracy.max(axis=0), color=style["color"], alpha=0.15, lw=0)

        # Methods that move alike would hide one another: each is drawn a little beside its place.
        beside = 0.06 * (methods.index(method) - (len(methods) - 1) / 2)
        boundary = _series(mine, lambda m: m["boundary"]).mean(axis=0)
        boundary_axis.step(epochs, boundary + beside, where="mid", label=name, **style)

        memory = _series(mine, lambda m: m["saved_activation_bytes"] / 2**20)
        memory_axis.plot(epochs, memory.mean(axis=0), label=name, **style)

    layers = runs[0].last["num_layers"]
    seeds = len({run.config.seed for run in runs})
    shading = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    time_axis.set(
        xlabel="training time, seconds (without evaluation)", ylabel="test accuracy, %", xlim=(0, None), ylim=(0, None)
    )
    time_axis.set_title(f"Accuracy over time ({shading})")
    boundary_axis.set(xlabel="epoch", ylabel=f"layers before the boundary (of {layers})", ylim=(-0.4, layers + 0.4))
    boundary_axis.axhline(layers, color="0.6", linewidth=1, linestyle=":")
    boundary_axis.annotate("depth of the network", (1, layers - 0.3), color="0.4", va="top")
    boundary_axis.set_title("Boundary between local learning and SGD")
    memory_axis.set(xlabel="epoch", ylabel="activations saved for the backward pass, MiB", ylim=(0, None))
    memory_axis.set_title("Memory of saved activations")
    for axis in (time_axis, boundary_axis, memory_axis):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (boundary_axis, memory_axis):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*time_axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods), frameon=False)
    figure.suptitle(title, fontweight="bold")

    pictures = {}
    for suffix in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=130)
        pictures[suffix] = buffer.getvalue()
    return pictures


def _name(config: RunConfig) -> str:
    names = {
        "sgd": "SGD",
        "freeze": "frozen prefix",
        "prunetrain": f"PruneTrain, lasso ratio {config.lasso_ratio:g}",
        "stochastic-depth": f"stochastic depth, survival {config.survival:g}",
    }
    return names.get(config.method, f"local prefix, learning rate {config.local_lr:g}")


def _series(runs: Sequence[Run], value: Callable[[dict[str, Any]], float]) -> npt.NDArray[np.float64]:
    """``value`` of every epoch of every run ``[runs, epochs]``, as far as all runs have come."""
    length = min(len(run.metrics) for run in runs)
    return np.array([[value(m) for m in run.metrics[:length]] for run in runs], dtype=np.float64)
