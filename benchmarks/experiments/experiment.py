"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.experiments.cells import Cell, Network, Variant
from benchmarks.experiments.scales import Study
from benchmarks.experiments.store import Result
from benchmarks.experiments.timing import Timings

Runs = dict[str, dict[int, Result]]
"""Finished runs of one network: label to seed to result."""


@dataclass(frozen=True)
class Experiment:
    """Tables and pictures are made of the finished cells alone.

    ``networks`` takes the study to the networks it is about, ``variants`` one of them to its rows; ``paper`` is what the paper's text
    states. ``tables`` gets the finished runs of all networks.
    """

    title: str
    networks: Callable[[Study], tuple[Network, ...]]
    variants: Callable[[Study, Network], list[Variant]]
    tables: Callable[[Study, dict[Network, Runs], Timings], dict[str, str]]
    picture: Callable[[Study, dict[Network, Runs], Timings], bytes] | None = None
    paper: str = ""
    pareto: bool = False

    def cells(self, study: Study) -> list[Cell]:
        """All of the first seed first."""
        return [
            study.cell(network, variant, seed)
            for seed in study.seed_range(pareto=self.pareto)
            for network in self.networks(study)
            for variant in self.variants(study, network)
        ]


def each(
    table: Callable[[Study, Network, Runs, Timings], str],
) -> Callable[[Study, dict[Network, Runs], Timings], dict[str, str]]:
    """``tables`` of an experiment with one for each network."""

    def tables(study: Study, runs: dict[Network, Runs], timings: Timings) -> dict[str, str]:
        return {f"{network[1]} on {network[0]}": table(study, network, mine, timings) for network, mine in runs.items()}

    return tables
