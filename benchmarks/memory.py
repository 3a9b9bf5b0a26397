"""Memory of a training step by the position of the boundary: what autograd saves, and what the process really takes.

python benchmarks/memory.py --out results.json          # again with --resume if it was stopped
python benchmarks/memory.py --table results.json --picture memory.png

Every row is a process of its own: its peak resident set in two steps, less what it was with the model and the pictures in place;
so gradients and the optimizer's state count. Paper, figure 4: ResNet-50 on ImageNet, with mini-batches of 64 on a GPU of 10 GB,
takes less than 5 GB at epoch 33 of 90. It does not say what all of SGD takes, so half of that is what is checked. The network
``resnet50-paper`` is that setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

from benchmarks.records import Records
from benchmarks.step_variants import LAYOUTS, SETTINGS, Setting, example, make, network
from benchmarks.tables import aligned, number
from localsgd_ext import DynamicModeSelection
from localsgd_ext.train import environment
from localsgd_ext.train.files import read_json, write_atomically

POSITIONS = tuple(step / 8 for step in range(7))  # up to the paper's l_max, 0.75
METHODS = ("sgd", "local", "naive", "frozen")  # sgd at position 0 only
PAPER = "resnet50-paper"
PAPER_EPOCH, PAPER_EPOCHS, PAPER_BLOCK = 33, 90, 3  # t_shift: the layers of a bottleneck
PAPER_POSITION = 12 / 54  # the boundary that equation 2 allows by then
PAPER_SHARE = 0.5
NETWORKS = {**SETTINGS, PAPER: Setting("resnet50", image=224, batch=64, classes=1000)}
MIB = 2**20
TIME_LIMIT = 600.0  # seconds of a row


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--layouts", default="nchw", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--positions", default=",".join(map(str, POSITIONS)), help="shares of the layers in the prefix")
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--image", type=int, metavar="PIXELS", help="instead of each network's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further row after that")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="only print the tables of a results file")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw one as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a row, measured in this process
    args = parser.parse_args(argv)
    args.networks, args.layouts = args.networks.split(","), args.layouts.split(",")
    args.positions = [float(text) for text in args.positions.split(",")]
    for option, known in (("networks", NETWORKS), ("layouts", LAYOUTS)):
        for value in getattr(args, option):
            if value not in known:
                parser.error(f"--{option} must be of {', '.join(known)}, got {value!r}")
    if not all(0 <= value < 1 for value in args.positions):
        parser.error(f"--positions must be in [0, 1), got {args.positions}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    return args


def work(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    todo = {}
    for name in args.networks:
        setting = NETWORKS[name]
        methods = METHODS[1:2] if name == PAPER else METHODS[1:]  # a row of the paper's takes minutes
        sizes = {key: getattr(args, key) or getattr(setting, key) for key in ("batch", "image")}
        for layout in args.layouts:
            for position in sorted({*args.positions, PAPER_POSITION}) if name == PAPER else args.positions:
                for method in ("sgd",) if position == 0 else methods:
                    todo[f"{name}|{layout}|{position}|{method}"] = {
                        "network": name, "layout": layout, "position": position, "method": method, "threads": args.threads,
                        **sizes
                    }  # fmt: skip
    return todo


def one(task: dict[str, Any]) -> dict[str, Any]:
    """Measured in this process, which must be a fresh one."""
    import torch
    import torch.nn.functional as F

    from localsgd_ext import trace_layers
    from localsgd_ext.saved import saved_activations

    torch.set_num_threads(task["threads"])
    setting = dataclasses.replace(NETWORKS[task["network"]], image=task["image"], batch=task["batch"])
    x, y = example(setting, task["layout"])
    start = network(setting, task["layout"])
    plan = trace_layers(start, x[:2])
    boundary = int(task["position"] * len(plan))
    variant = make(task["method"], start, x[:2], boundary)
    del start
    before = resident("VmRSS")
    reset_peak()
    with saved_activations(variant.model) as saved:
        loss = F.cross_entropy(variant.model(x), y)
    del loss
    for _ in range(2):
        variant.step(x, y)
    peak = resident("VmHWM") - before
    return {
        **task,
        "boundary": boundary,
        "layers": len(plan),
        "saved_bytes": saved.total,
        "peak_rss_bytes": peak,
        "status": "ok",
    }


def resident(field: str) -> int:
    """``VmRSS``: bytes resident now; ``VmHWM``: at most so far. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def in_fresh_process(task: dict[str, Any]) -> dict[str, Any]:
    # glibc then gives every large block back when it is freed, and takes the next one from the system: the peak is what was in use.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    command = [sys.executable, __file__, "--one", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False, env=environ)
    except subprocess.TimeoutExpired:
        return {**task, "status": "ERROR", "why": f"it took more than {TIME_LIMIT:g} s"}
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        return {**task, "status": "ERROR", "why": why}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def report(content: dict[str, Any]) -> str:
    """All tables and the verdict, from the file's content alone."""
    rows = [row for row in content["rows"].values() if row["status"] == "ok"]
    about = content["environment"]
    parts = [f"{about['cpu']}; torch {about['torch']}; commit {about['git_commit']}; fp32, SGD with momentum"]
    parts += [f"ERROR: {row['network']}, {row['method']}: {row['why']}" for row in content["rows"].values() if "why" in row]
    table = [("network, layout, prefix: method", "saved MiB", "of SGD", "peak RSS MiB", "of SGD")]
    for row in rows:
        base = baseline(rows, row)
        shares = ["-" if base is None else f"{100 * row[key] / base[key]:.0f} %" for key in ("saved_bytes", "peak_rss_bytes")]
        name = f"{row['network']} {row['image']} px b{row['batch']} {row['layout']} {row['boundary']}/{row['layers']}"
        saved, peak = number(row["saved_bytes"] / MIB), number(row["peak_rss_bytes"] / MIB)
        table.append((f"{name}: {row['method']}", saved, shares[0], peak, shares[1]))
    parts.append(aligned(table))
    parts += verdicts(rows)
    return "\n\n".join(parts) + "\n"


def baseline(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    same = ("network", "layout", "batch", "image")
    return next((r for r in rows if r["method"] == "sgd" and all(r[key] == row[key] for key in same)), None)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The paper's figure 4 for each layout of its network, at every position measured."""
    lines = []
    for layout in dict.fromkeys(row["layout"] for row in rows):
        mine = [r for r in rows if (r["network"], r["layout"], r["method"]) == (PAPER, layout, "local")]
        mine.sort(key=lambda row: row["boundary"])
        base = baseline(rows, mine[0]) if mine else None
        if base is None:
            continue
        reached = fastest_boundary(base["layers"])
        then = max((row for row in mine if row["boundary"] <= reached), key=lambda row: row["boundary"], default=base)
        half = next((row["boundary"] for row in mine if _share(row, base) <= PAPER_SHARE), None)
        lines.append(
            f"Paper, figure 4 (ResNet-50, batch 64: under 5 of 10 GB at epoch {PAPER_EPOCH} of {PAPER_EPOCHS}), {layout}: a step of SGD "
            f"peaks at {base['peak_rss_bytes'] / 1e9:.2f} GB. With {then['boundary']} of {base['layers']} layers local (equation 2 "
            f"allows {reached} by then) {_against(then, base)}; with {mine[-1]['boundary']}, the most measured, "
            f"{_against(mine[-1], base)}. The first position measured at which half is met: {half or 'none'}."
        )
    return lines


def _share(row: dict[str, Any], base: dict[str, Any]) -> float:
    share: float = row["peak_rss_bytes"] / base["peak_rss_bytes"]
    return share


def _against(row: dict[str, Any], base: dict[str, Any]) -> str:
    share = _share(row, base)
    met = "met" if share <= PAPER_SHARE else "not met"
    return f"at {row['peak_rss_bytes'] / 1e9:.2f} GB, {100 * share:.0f} % of it (half: {met})"


def fastest_boundary(layers: int) -> int:
    """Where Algorithm 1 has the boundary in the paper's epoch if it moves whenever equation 2 lets it."""
    schedule = DynamicModeSelection(layers, PAPER_EPOCHS, t_shift=PAPER_BLOCK)
    for epoch in range(PAPER_EPOCH):
        schedule.step(0.5**epoch)
    return schedule.boundary


COLOURS = {"saved_bytes": ("saved activations", "#0072B2"), "peak_rss_bytes": ("peak resident memory", "#D55E00")}
MARKS = {"local": "-o", "frozen": "+", "naive": "x"}


def picture(content: dict[str, Any]) -> bytes:
    """Saved activations and peak resident memory by position, relative to SGD, a panel for each network."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"].values() if row["status"] == "ok"]
    panels = list(dict.fromkeys((row["network"], row["layout"]) for row in rows))
    columns = min(3, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, [row for row in rows if (row["network"], row["layout"]) == panel])
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for column in range(columns):  # the lowest panel of each
        axes[(len(panels) - 1 - column) // columns, column].tick_params(labelbottom=True)
    figure.supxlabel("layers in the local prefix, % of all", fontsize=9)
    figure.supylabel("memory of a training step, % of SGD's", fontsize=9)
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = sorted(handles, reverse=True)  # a column for each quantity
    figure.legend([handles[label] for label in labels], labels, fontsize=8, ncols=2, loc="outside upper center", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _panel(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    base = baseline(rows, rows[0])
    title = f"{rows[0]['network']}, {rows[0]['image']} px, batch {rows[0]['batch']}, {rows[0]['layout']}"
    axis.set(ylim=(0, 105), xlim=(-3, 78), xticks=range(0, 76, 25), title="")
    axis.grid(color="#E0E0E0", lw=0.5)
    if base is not None:
        title += f"\nSGD: {number(base['saved_bytes'] / MIB)} MiB saved, {number(base['peak_rss_bytes'] / MIB)} MiB peak"
        for method, mark in MARKS.items():
            points = sorted((r for r in rows if r["method"] in (method, "sgd")), key=lambda row: row["boundary"])
            where = [100 * row["boundary"] / row["layers"] for row in points]
            for key, (label, colour) in COLOURS.items():
                shares = [100 * row[key] / base[key] for row in points]
                axis.plot(where, shares, mark, color=colour, ms=3 if mark == "-o" else 6, lw=1, label=f"{label}, {method}")
        if rows[0]["network"] == PAPER:
            where = 100 * fastest_boundary(base["layers"]) / base["layers"], 100 * PAPER_SHARE
            axis.plot(*where, "*", color="#000000", ms=9)
            arrow = {"arrowstyle": "-", "lw": 0.5}
            text = f"paper: half at epoch {PAPER_EPOCH},\nwhere the boundary can be then"
            axis.annotate(text, where, (75, 85), ha="right", va="center", fontsize=7, arrowprops=arrow)
    axis.set_title(title, fontsize=8)


def measure(args: argparse.Namespace) -> Records:
    header = {"command": shlex.join(["python", "benchmarks/memory.py", *args.argv]), "environment": environment.describe("cpu")}
    records = Records(args.out, header, resume=args.resume)
    records.save()
    tasks = work(args)
    for key in records.todo(tasks, args.budget):
        records.add(key, in_fresh_process(tasks[key]))
        print(f"{key}: {records.rows[key]['status']}", file=sys.stderr, flush=True)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a row failed; 2: wrong arguments or file; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return 0
    try:
        records = None if args.table else measure(args)
        content = records.content if records else read_json(args.table)
        print(report(content), end="")
        if args.picture:
            write_atomically(args.picture, picture(content))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if records and records.left:
        print(f"{len(records.left)} rows are left: go on with --resume", file=sys.stderr)
        return 3
    return int(any(row["status"] != "ok" for row in content["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
