"""The tables of benchmarks/gpu_step.py, from a results file alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks import ROOT
from benchmarks.experiments import methods
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Store
from benchmarks.tables import aligned, number, times
from localsgd_ext import StaticModeSelection

LEAST_OF_LIMIT, MOST_SAVED = 0.95, 0.4
EPOCHS, L_MAX = 90, 0.75
SHOWN = 6  # epochs of a run
PAPER = "up to 1.5x (CIFAR) and 1.4x (ImageNet) for a whole run"
GIB = 2**30
Row = dict[str, Any]


def measured_paths() -> list[Row]:
    """Where the boundary stands over a run, as shares of the layers, epoch by epoch: the linear schedule of a local prefix, and what the
    default did on generated letters, with what that cost in accuracy."""
    schedule = StaticModeSelection(100, EPOCHS, kind="linear", l_max=L_MAX)
    shares = [0.0]
    for _ in range(EPOCHS - 1):
        schedule.step()
        shares.append(schedule.boundary / 100)
    paths = [{"name": f"local, linear to {100 * L_MAX:.0f} %", "method": "local", "shares": shares, "points": "not measured"}]
    study, store = Study(SCALES["cpu"]), Store(ROOT / "benchmarks" / "results" / "paper" / "cpu")
    for network in study.networks("cifar"):
        cells = [
            study.cell(network, variant, seed)
            for variant in (methods.SGD, methods.FREEZING)
            for seed in study.seed_range(pareto=True)
        ]
        runs = store.by_label(cells)
        frozen, sgd = (runs.get(variant.label, {}) for variant in (methods.FREEZING, methods.SGD))
        if (lost := methods.difference(frozen, sgd)) is None:
            continue
        by_epoch = zip(*(result.boundaries for result in frozen.values()), strict=True)
        layers = int(next(iter(frozen.values())).about["num_layers"])
        mean = [statistics.fmean(boundaries) / layers for boundaries in by_epoch]
        name = f"frozen, the default as on {network[1]}"
        paths.append({"name": name, "method": "frozen", "shares": mean, "points": f"{lost.text()} (letters)"})
    return paths


def report(content: Row) -> str:
    """All tables."""
    environment, rows = content["environment"], list(content["rows"].values())
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} threads"
    parts = [f"{where}; torch {environment['torch']}; commit {environment['git_commit']}"]
    parts += [f"{row['status']}, not timed: {_name(row)}: {_reason(row)}" for row in rows if row["status"] != "ok"]
    if good := [row for row in rows if row["status"] == "ok"]:
        parts.append(f"### One step: speed-up over SGD in the same dress (kernels alone: from cold caches)\n\n{_speed(good)}")
        parts.append(f"### Memory beyond weights, momentum and workspaces, in % of SGD's\n\n{_memory(good)}")
        parts.append(f"### Through a run: speed-up over SGD by epoch (the paper: {PAPER})\n\n{_runs(good, content['paths'])}")
    return "\n\n".join(parts) + "\n"


def _name(row: Row) -> str:
    if "image" not in row:
        return f"{row['network']} b{row['batch']} {row['dress']}"
    return f"{row['network']} {row['image']} px b{row['batch']} {row['dtype']} {row['dress']}"


def _reason(row: Row) -> str:
    errors = ", ".join(f"{which} {error:.1e} of {row['allowed'][which]:.1e}" for which, error in row.get("parity", {}).items())
    said = row.get("failed") or row.get("why") or ""
    return f"{said} (errors: {errors} allowed)" if errors else said


def limit_ms(row: Row, depth: str) -> float:
    """What the frozen step and the kernels alone take."""
    return float(row["ms"][f"frozen {depth}"] + row["kernels_ms"][depth])


def of_limit(row: Row, depth: str) -> float:
    """How much of the speed that :func:`limit_ms` would be a local step has."""
    return limit_ms(row, depth) / float(row["ms"][f"local {depth}"])


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def _speed(rows: Sequence[Row]) -> str:
    table = [
        (
            "network, dress: prefix", "SGD ms", "frozen", "local", "kernels ms", "frozen and kernels", "by multiply-adds",
            "share of limit", f">= {100 * LEAST_OF_LIMIT:.0f} %",
        )
    ]  # fmt: skip
    for row in rows:
        sgd, macs = row["ms"]["sgd"], row["macs"]
        for depth, boundary in row["boundaries"].items():
            share = of_limit(row, depth)  # of none where kernels that no graph holds waited for the host
            table.append(
                (
                    f"{_name(row)}: {boundary}/{row['layers']}",
                    number(sgd),
                    times(sgd / row["ms"][f"frozen {depth}"]),
                    times(sgd / row["ms"][f"local {depth}"]),
                    number(row["kernels_ms"][depth]),
                    times(sgd / limit_ms(row, depth)),
                    times(macs["sgd"] / macs[f"local {depth}"]),
                    f"{100 * share:.0f} %",
                    "-" if row["kernels_how"][depth] == "events" else _met(share >= LEAST_OF_LIMIT),
                )
            )
    return aligned(table)


def _memory(rows: Sequence[Row]) -> str:
    table = [
        (
            "network, dress: prefix",
            "SGD: saved, peak GiB",
            "saved",
            "frozen peak",
            "local peak",
            f"saved <= {100 * MOST_SAVED:.0f} %",
        )
    ]
    for row in rows:
        saved, peak = row["saved_bytes"], row["peak_bytes"]

        def share(which: str, peak: Row = peak) -> str:
            return "-" if peak[which] is None else f"{100 * peak[which] / peak['sgd']:.0f}"

        whole = "-" if peak["sgd"] is None else number(peak["sgd"] / GIB)
        for depth, boundary in row["boundaries"].items():
            kept = saved[depth] / saved["0"]
            verdict = _met(kept <= MOST_SAVED) if float(depth) == L_MAX else "-"
            table.append(
                (
                    f"{_name(row)}: {boundary}/{row['layers']}", f"{number(saved['0'] / GIB)}, {whole}", f"{100 * kept:.0f}",
                    share(f"frozen {depth}"), share(f"local {depth}"), verdict,
                )
            )  # fmt: skip
    return aligned(table)


def step_ms(row: Row, method: str, share: float) -> float:
    """Of a step with that share of the layers in the prefix: between two measured ones on the line through them, beyond the last one
    as long as that."""
    known = [(0.0, row["ms"]["sgd"])]
    known += [(boundary / row["layers"], row["ms"][f"{method} {depth}"]) for depth, boundary in row["boundaries"].items()]
    for (left, before), (right, after) in pairwise(known):
        if share <= right:
            return float(before + (after - before) * (share - left) / (right - left))
    return float(known[-1][1])


def _runs(rows: Sequence[Row], paths: Sequence[Row]) -> str:
    marks = [f"{100 * (i + 1) / SHOWN:.0f} %" for i in range(SHOWN)]
    table = [("network, dress: boundary", *marks, "whole run", "accuracy")]
    for row in rows:
        for path in paths:
            shares = path["shares"]
            ms = [step_ms(row, path["method"], share) for share in shares]
            shown = [row["ms"]["sgd"] / ms[round((i + 1) / SHOWN * len(ms)) - 1] for i in range(SHOWN)]
            whole = row["ms"]["sgd"] * len(ms) / sum(ms)
            table.append((f"{_name(row)}: {path['name']}", *map(times, shown), times(whole), path["points"]))
    return aligned(table)
