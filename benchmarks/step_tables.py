"""The tables of benchmarks/step.py, from a results file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.tables import aligned, number, times

PHASES = ("forward", "hooks", "backward", "optimizer", "step")
SAMPLES = {"local": 1.0, "local/2": 0.5, "local/4": 0.25, "local/8": 0.125}
COMPARED = ("frozen", "frozen eval", "frozen fold", "naive", *SAMPLES)
MOST_OVER_KERNELS, MOST_HOOK_US, CLOSE = 1.1, 15.0, 1.05
Row = dict[str, Any]


def report(content: Row) -> str:
    """All tables."""
    rows = list(content["rows"].values())
    good = [row for row in rows if row["status"] == "ok"]
    environment = content["environment"]
    kernels = "compiled kernels" if environment["compiled_kernels"] else "no compiled kernels: the plain PyTorch reference"
    parts = [
        f"{environment['cpu']}, {environment['threads']} threads; torch {environment['torch']}; commit "
        f"{environment['git_commit']}; {kernels}; fp32"
    ]
    parts += [
        f"FAILED, not timed: {_name(row)}: error of a step {max(row['parity'].values()):.1e}, allowed {row['allowed']:.0e}"
        for row in rows
        if row["status"] != "ok"
    ]
    if good:
        parts.append(f"### One step: ms, and speed-up over SGD measured (limit by multiply-adds)\n\n{_speed(good)}")
        parts.append(f"### Phases, ms (forward holds the hooks)\n\n{_phases(good)}")
        parts.append(
            "### What the local step costs over the frozen one, and the sum of its kernels' times alone\n\n"
            f"{_over_kernels(good)}"
        )
        parts.append(f"### The hook around no kernel, µs per layer, at most {MOST_HOOK_US:.0f}\n\n{_hooks(content, good)}")
        parts.append(f"### The sample with which the local step is within 5 % of the frozen one\n\n{_close(good)}")
    return "\n\n".join(parts) + "\n"


def _name(row: Row) -> str:
    return f"{row['network']} {row['image']} px b{row['batch']} {row['layout']} {row['boundary']}/{row['layers']}"


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


def _speed(rows: Sequence[Row]) -> str:
    table = [("network, layout, prefix", "SGD ms", *COMPARED)]
    for row in rows:
        step = {variant: phases["step"] for variant, phases in row["ms"].items()}
        over = [
            f"{times(step['sgd'] / step[v])} ({number(row['macs']['sgd'] / row['macs'][v])})" if v in step else "-"
            for v in COMPARED  # files from before a variant do without it
        ]
        table.append((_name(row), number(step["sgd"]), *over))
    return aligned(table)


def _phases(rows: Sequence[Row]) -> str:
    table = [("network, layout, prefix: variant", *PHASES)]
    for row in rows:
        for variant, phases in row["ms"].items():
            table.append((f"{_name(row)}: {variant}", *(number(phases[phase]) for phase in PHASES)))
    return aligned(table)


def over_kernels(row: Row, variant: str) -> tuple[float, float]:
    """Milliseconds of the local step over the frozen one, and of its kernels alone."""
    pairs = row.get("over_frozen_ms") if variant == "local" else None  # not in files from before there were pairs
    over = median(pairs) if pairs else row["ms"][variant]["step"] - row["ms"]["frozen"]["step"]
    return over, row["kernels_ms"][variant]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Of about 95 % confidence, by order statistics, which suppose no distribution; of fewer than 6 values all, which is less."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))  # 1.96 standard deviations of the binomial distribution
    middle = (len(ordered) - 1) / 2
    low, high = math.floor(middle - reach), math.ceil(middle + reach)
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


def _over_kernels(rows: Sequence[Row]) -> str:
    table = [
        (
            "network, layout, prefix: variant",
            "over frozen ms",
            "kernels ms",
            "ratio [95 %], of pairs",
            f"<= {MOST_OVER_KERNELS}x",
        )
    ]
    for row in rows:
        for variant in SAMPLES:
            over, kernels = over_kernels(row, variant)
            ratio = times(over / kernels)
            if variant == "local" and (pairs := row.get("over_frozen_ms")):
                low, high = median_interval(pairs)
                ratio += f" [{times(low / kernels)}, {times(high / kernels)}], {len(pairs)}"
            met = _met(over <= MOST_OVER_KERNELS * kernels)
            table.append((f"{_name(row)}: {variant}", number(over), number(kernels), ratio, met))
    return aligned(table)


def _hooks(content: Row, rows: Sequence[Row]) -> str:
    table = [("where", "µs", "an empty hook", "target")]
    for kind, us in content["hook_alone_us"].items():
        where = f"hooked minus unhooked, tiny {kind} layers"
        table.append((where, number(us["ours"]), number(us["empty"]), _met(us["ours"] <= MOST_HOOK_US)))
    for row in rows:
        table.append((f"inside it, {_name(row)}", number(row["hook_us"]), "-", _met(row["hook_us"] <= MOST_HOOK_US)))
    return aligned(table)


def close_sample(row: Row) -> str:
    """The largest sample, as a variant's name, or ``"none"``."""
    frozen = row["ms"]["frozen"]["step"]
    return next((variant for variant in SAMPLES if row["ms"][variant]["step"] <= CLOSE * frozen), "none")


def _close(rows: Sequence[Row]) -> str:
    table = [("network, layout, prefix", "sample", *(f"{variant}/frozen" for variant in SAMPLES))]
    for row in rows:
        frozen = row["ms"]["frozen"]["step"]
        variant = close_sample(row)
        shown = "none of these" if variant == "none" else f"{SAMPLES[variant]:g}"
        table.append((_name(row), shown, *(times(row["ms"][v]["step"] / frozen) for v in SAMPLES)))
    return aligned(table)
