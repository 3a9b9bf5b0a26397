"""Memory of a training step by the position of the boundary: what autograd saves, and what the process really takes.

python benchmarks/memory.py --out results.json          # again with --resume if it was stopped
python benchmarks/memory.py --table results.json --picture memory.png

Every row is a process of its own: its peak resident set in two steps, less what it was with the model and the pictures in place;
so gradients and the optimizer's state count. Paper, figure 4: at the end of a ResNet-50 run the activations need half of what
they did at its start.
"""

from __future__ import annotations

import argparse
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
from localsgd_ext.train import environment
from localsgd_ext.train.files import read_json, write_atomically

POSITIONS = tuple(step / 8 for step in range(7))  # up to the paper's l_max, 0.75
METHODS = ("sgd", "local", "naive", "frozen")  # sgd at position 0 only
PAPER = "resnet50"
PAPER_SHARE = 0.5
MIB = 2**20


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
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
    for option, known in (("networks", SETTINGS), ("layouts", LAYOUTS)):
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
        setting = SETTINGS[name]
        sizes = {key: getattr(args, key) or getattr(setting, key) for key in ("batch", "image")}
        for layout in args.layouts:
            for position in args.positions:
                for method in ("sgd",) if position == 0 else METHODS[1:]:
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
    from localsgd_ext.train.measure import saved_activations

    torch.set_num_threads(task["threads"])
    setting = Setting(task["network"], task["image"], task["batch"], SETTINGS[task["network"]].classes)
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environ)
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
    """The paper's figure 4 for each layout of its network: the last position measured against SGD."""
    lines = []
    for layout in dict.fromkeys(row["layout"] for row in rows):
        mine = [r for r in rows if (r["network"], r["layout"], r["method"]) == (PAPER, layout, "local")]
        last = max(mine, key=lambda row: row["position"], default=None)
        base = None if last is None else baseline(rows, last)
        if last is not None and base is not None:
            share = last["saved_bytes"] / base["saved_bytes"]
            met = "met" if share <= PAPER_SHARE else "not met"
            lines.append(
                f"Paper, figure 4 ({PAPER}, half at the end of the run), {layout}: with {last['boundary']} of {last['layers']} layers "
                f"local {100 * share:.0f} % of SGD's activations are saved: {met}"
            )
    return lines


def picture(content: dict[str, Any]) -> bytes:
    """Saved activations (lines) and peak resident memory (dashed) by position, relative to SGD, a panel for each network."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"].values() if row["status"] == "ok"]
    panels = list(dict.fromkeys((row["network"], row["layout"]) for row in rows))
    figure = Figure(figsize=(4 * max(1, len(panels)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    colours = {"local": "#009E73", "naive": "#CC79A7", "frozen": "#E69F00"}
    for axis, panel in zip(axes, panels, strict=False):
        mine = [row for row in rows if (row["network"], row["layout"]) == panel]
        for method, colour in colours.items():
            line = sorted((r for r in mine if r["method"] in ("sgd", method)), key=lambda row: row["position"])
            if not line or (base := baseline(rows, line[0])) is None:
                continue
            where = [100 * row["position"] for row in line]
            for key, style in (("saved_bytes", "-"), ("peak_rss_bytes", "--")):
                label = f"{method}, {'saved' if key == 'saved_bytes' else 'peak RSS'}"
                axis.plot(where, [100 * r[key] / base[key] for r in line], style, color=colour, marker="o", ms=3, label=label)
        if panel[0] == PAPER:
            axis.axhline(100 * PAPER_SHARE, color="#999999", lw=1, ls=":", label="paper, figure 4")
        axis.set(title=f"{panel[0]}, {panel[1]}", xlabel="layers in the prefix, %", ylim=(0, None))
    axes[0].set_ylabel("memory of a step, % of SGD's")
    axes[-1].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


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
