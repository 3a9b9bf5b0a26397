"""The tables and the picture of benchmarks/study.py, from a results file alone."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks.tables import aligned
from benchmarks.targets import geomean

Row = dict[str, Any]
FIRST = 4  # layers that are local from the first epoch of a moving boundary on
DRAWN = {
    "frozen": "#000000", "sgd": "#999999", "literal 0.01": "#D55E00", "literal 0.001": "#E69F00", "sign -1, 0.01": "#CC79A7",
    "sign in turn, 0.01": "#F0E442", "centred 0.01": "#56B4E9", "BN output 0.01": "#0072B2", "subspace 0.01": "#009E73",
    "random 0.01": "#8C564B",
}  # fmt: skip


class Study:
    """Runs by variant, each beside the network it began from and the frozen run of its seed and recipe."""

    def __init__(self, content: Row) -> None:
        self.content = content
        self.runs: dict[str, list[Row]] = {}
        self.starts: dict[int, Row] = {}
        for key, row in content["rows"].items():
            name = key.rpartition("|")[0]
            if name == "start":
                self.starts[row["seed"]] = row
            else:
                self.runs.setdefault(name, []).append(row)

    def frozen(self, run: Row) -> Row | None:
        same = ("recipe", "seed")
        frozen = (r for rows in self.runs.values() for r in rows if r["rule"] == "frozen")
        return next((r for r in frozen if all(r[key] == run[key] for key in same)), None)

    def begin(self, run: Row) -> Row:
        """The measures of the network that the run began from."""
        layers: Row = self.starts[run["seed"]]["epochs"][-1]["layers"]
        return layers

    def kept(self, run: Row, measure: str, epoch: int = -1, layers: int | None = None) -> float:
        """Geometric mean over the local layers of a measure against its value at the beginning."""
        now = run["epochs"][epoch]["layers"][measure][:layers]
        return geomean([after / before for after, before in zip(now, self.begin(run)[measure], strict=False)]) or 0.0


def angle(layers: Row, count: int = FIRST) -> float:
    """In degrees, between the filters' dominant direction and the top one of their patches, mean over the first ``count`` layers."""
    return statistics.fmean(math.degrees(math.acos(min(1.0, cosine))) for cosine in layers["top"][:count])


def accuracy(run: Row) -> float:
    return 100 * float(run["epochs"][-1]["accuracy"])


def mean_layers(run: Row, measure: str) -> float:
    """At the end, over the local layers."""
    return statistics.fmean(run["epochs"][-1]["layers"][measure])


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def report(content: Row) -> str:
    """All tables."""
    about, sizes = content["environment"], content["sizes"]
    study = Study(content)
    head = (
        f"small_resnet on glyphs, {sizes['train']} training and {sizes['test']} test pictures, batch 32; SGD for {sizes['start']} "
        f"epochs, then the boundary moves to {sizes['last']} of 14 layers until epoch {sizes['epochs']}. {about['cpu']}, "
        f"{about['threads']} thread; torch {about['torch']}; commit {about['git_commit']}. Mean ± standard deviation over seeds."
    )
    moving = f"mean of the {sizes['last']} layers that turn local"
    tables = {"The layers as SGD left them before the boundary moves": _layers(study)} if study.starts else {}
    if study.runs:
        tables = {
            "What it costs: test accuracy, %": _costs(study),
            "What it does to the filters of the local layers, at the end": _filters(study),
            f"Epoch by epoch: sign, training loss, effective rank of the first {FIRST} layers in % of the beginning": _losses(
                study
            ),
            f"Epoch by epoch: effective rank and norm of the first {FIRST} layers in % of the beginning, angle of their filters to their "
            "patches' top direction in degrees; mean over seeds": _courses(study),
            f"How far SGD moves the weights in an epoch, % of their norm, {moving}": _moved(study),
            **tables,
        }
    parts = [head, *(f"### {title}\n\n{aligned(table)}" for title, table in tables.items())]
    return "\n\n".join(parts) + "\n"


def _costs(study: Study) -> list[Sequence[str]]:
    heading = ("rule", "accuracy", "minus frozen", "by seed", "with fresh BatchNorm, minus frozen", "settled, minus frozen")
    table: list[Sequence[str]] = [heading]
    for name, runs in study.runs.items():
        pairs = [(run, frozen) for run in runs if (frozen := study.frozen(run))]
        over = [accuracy(run) - accuracy(frozen) for run, frozen in pairs]
        later = [
            spread([100 * (run[key] - frozen[key]) for run, frozen in pairs if key in run], sign="+")
            for key in ("fresh", "settled")
        ]
        by_seed = " / ".join(f"{each:+.1f}" for each in over)
        table.append((name, spread([accuracy(run) for run in runs]), spread(over, sign="+"), by_seed, *later))
    return table


def _losses(study: Study) -> list[Sequence[str]]:
    """Of single seeds: the sign follows the loss, so that a mean would hide what happens."""
    epochs = next(iter(study.runs.values()))[0]["epochs"]
    table: list[Sequence[str]] = [("rule, seed", *(f"epoch {epoch['epoch'] + 1}" for epoch in epochs))]
    for name, runs in study.runs.items():
        for run in runs:
            learns = run["rule"] not in ("sgd", "frozen")
            ranks = [100 * study.kept(run, "rank", place, FIRST) for place in range(len(run["epochs"]))]
            shown = [
                f"{epoch['sign']:+d}: {epoch['loss']:.2f}, {rank:.0f} %" if learns else f"{epoch['loss']:.2f}"
                for epoch, rank in zip(run["epochs"], ranks, strict=True)
            ]
            table.append((f"{name}, {run['seed']}", *shown))
    return table


def courses(study: Study, runs: Sequence[Row]) -> list[tuple[float, float, float]]:
    """Rank and norm in % of the beginning, and angle, before the first epoch of ``runs`` and after each; mean over them."""
    begin = statistics.fmean(angle(study.begin(run)) for run in runs)
    return [
        (100.0, 100.0, begin),
        *(
            (
                statistics.fmean(100 * study.kept(run, "rank", place, FIRST) for run in runs),
                statistics.fmean(100 * study.kept(run, "norm", place, FIRST) for run in runs),
                statistics.fmean(angle(run["epochs"][place]["layers"]) for run in runs),
            )
            for place in range(min(len(run["epochs"]) for run in runs))
        ),
    ]


def _courses(study: Study) -> list[Sequence[str]]:
    epochs = next(iter(study.runs.values()))[0]["epochs"]
    table: list[Sequence[str]] = [("rule", "at the beginning", *(f"epoch {epoch['epoch'] + 1}" for epoch in epochs))]
    for name, runs in study.runs.items():
        table.append((name, *(f"{rank:.0f}, {norm:.0f}, {degrees:.0f}" for rank, norm, degrees in courses(study, runs))))
    return table


def _filters(study: Study) -> list[Sequence[str]]:
    heading = ("rule", "rank kept, %", f"first {FIRST} layers", "outputs' rank kept, %", "norm, times", "cos with top")
    table: list[Sequence[str]] = [(*heading, "with top, centred", "filters' mean cos", "moved in the last epoch, %")]
    begin = [{"epochs": [row["epochs"][-1]]} for row in study.starts.values()]
    cosines = ("top", "top_centred", "filters_top")

    def over(runs: Iterable[Row], value: Callable[[Row], float], digits: int) -> str:
        return f"{statistics.fmean(value(run) for run in runs):.{digits}f}"

    def cells(runs: Sequence[Row]) -> list[str]:
        return [over(runs, partial(mean_layers, measure=measure), 2) for measure in cosines]

    def moved(run: Row) -> float:
        last = run["epochs"][-1]
        return 100 * statistics.fmean(last["moved"][: len(last["layers"]["rank"])])

    table.append(("at the beginning", "100", "100", "100", "1.00", *cells(begin), over(begin, moved, 1)))
    for name, runs in study.runs.items():
        ranks = [
            over(runs, lambda run: 100 * study.kept(run, "rank"), 0),
            over(runs, lambda run: 100 * study.kept(run, "rank", layers=FIRST), 0),
            over(runs, lambda run: 100 * study.kept(run, "output_rank"), 0),
            over(runs, lambda run: study.kept(run, "norm"), 2),
        ]
        table.append((name, *ranks, *cells(runs), over(runs, moved, 1)))
    return table


def _moved(study: Study) -> list[Sequence[str]]:
    last = study.content["sizes"]["last"]
    starts = list(study.starts.values())

    def cells(runs: Sequence[Row]) -> list[str]:
        places = range(len(runs[0]["epochs"]))
        values = [[statistics.fmean(run["epochs"][place]["moved"][:last]) for run in runs] for place in places]
        return [f"{100 * statistics.fmean(each):.1f}" for each in values]

    first = cells(starts)
    followed = {name: runs for name, runs in study.runs.items() if runs[0]["rule"] == "sgd"}
    tails = {name: cells(runs) for name, runs in followed.items()}
    columns = len(first) + max((len(tail) for tail in tails.values()), default=0)
    table: list[Sequence[str]] = [("SGD throughout", *(f"epoch {place + 1}" for place in range(columns)))]
    table += [(name, *first, *tail) for name, tail in tails.items()]
    return table


def _layers(study: Study) -> list[Sequence[str]]:
    measures = ("rank", "norm", "top", "top_centred", "filters_top", "output_rank")
    heading = ("layer", "effective rank", "norm", "cos with top", "with top, centred", "filters' mean cos", "outputs' rank")
    table: list[Sequence[str]] = [heading]
    rows = [row["epochs"][-1]["layers"] for row in study.starts.values()]
    for place in range(len(rows[0]["rank"]) if rows else 0):
        table.append((str(place + 1), *(f"{statistics.fmean(row[m][place] for row in rows):.2f}" for m in measures)))
    return table


def picture(content: Row) -> bytes:
    """Rank, norm and angle by epoch, and what a rule costs by the rank of the filters that it leaves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    study = Study(content)
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    *by_epoch, right = figure.subplots(2, 2).flat
    start = content["sizes"]["start"]
    for name, runs in study.runs.items():
        colour = DRAWN.get(name)
        if colour is not None:
            epochs = [start, *(epoch["epoch"] + 1 for epoch in runs[0]["epochs"])]
            for axis, values in zip(by_epoch, zip(*courses(study, runs), strict=True), strict=True):
                axis.plot(epochs[: len(values)], values, "-o", ms=3, color=colour, label=name)
        pairs = [(run, frozen) for run in runs if (frozen := study.frozen(run))]
        if pairs and runs[0]["recipe"] == "cosine":
            x = [100 * study.kept(run, "rank") for run, _ in pairs]
            y = [accuracy(run) - accuracy(frozen) for run, frozen in pairs]
            right.plot(statistics.fmean(x), statistics.fmean(y), "o", color=colour or "#BBBBBB", ms=6)
            if "settled" in runs[0]:
                y = [100 * (run["settled"] - frozen["settled"]) for run, frozen in pairs]
                right.plot(statistics.fmean(x), statistics.fmean(y), "x", color=colour or "#BBBBBB", ms=6)
    of_the_beginning = f"% of epoch {start}'s\n(first {FIRST} layers)"
    for axis, label in zip(
        by_epoch,
        (
            f"effective rank, {of_the_beginning}",
            f"norm, {of_the_beginning}",
            f"angle to the top direction, degrees\n(first {FIRST} layers)",
        ),
        strict=True,
    ):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    by_epoch[0].legend(fontsize=7, frameon=False)
    right.set(
        xlabel="effective rank kept at the end, %\n(all local layers)",
        ylabel="test accuracy minus frozen, points\n(o at the end, x after the head has settled)",
    )
    for axis in (*by_epoch, right):
        axis.grid(color="#E0E0E0", lw=0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
