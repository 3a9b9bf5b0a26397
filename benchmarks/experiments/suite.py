"""The experiments by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.experiments import pareto
from benchmarks.experiments.cells import Cell, Network
from benchmarks.experiments.report import missing, stamp
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result, Store
from benchmarks.experiments.timing import Timings

Runs = dict[str, dict[int, Result]]
"""Finished runs of one network: label to seed to result."""


@dataclass(frozen=True)
class Experiment:
    """``table`` and ``picture`` are made of the finished cells alone."""

    title: str
    cells: Callable[[Study], list[Cell]]
    table: Callable[[Study, Network, Runs, Timings], str]
    picture: Callable[[Study, dict[Network, Runs]], bytes] | None = None
    needs: str = ""
    """What the experiment waits for, if it cannot be run yet."""


EXPERIMENTS = {
    "pareto": Experiment("Accuracy against cost", pareto.cells, pareto.table, pareto.picture),
}


def finished(cells: Iterable[Cell], store: Store) -> dict[Network, Runs]:
    """By network, those that have finished anything."""
    by_network: dict[Network, list[Cell]] = {}
    for cell in cells:
        by_network.setdefault(cell.network, []).append(cell)
    return {network: runs for network, mine in by_network.items() if (runs := store.by_label(mine))}


def report(name: str, study: Study, store: Store, timings: Timings) -> str:
    """The experiment's tables as Markdown."""
    experiment = EXPERIMENTS[name]
    cells = experiment.cells(study)
    parts = [f"## {name}: {experiment.title}", stamp(study, cells, store)]
    for network, runs in finished(cells, store).items():
        parts += [f"### {network[1]} on {network[0]}", experiment.table(study, network, runs, timings)]
    parts += [text for text in (experiment.needs and f"Missing: {experiment.needs}", missing(cells, store)) if text]
    return "\n\n".join(parts) + "\n"
