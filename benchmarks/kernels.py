"""Times the update of every layer of real networks against the library and against what a user would write.

python benchmarks/kernels.py --device cuda --out results.json     # again with --resume if it was stopped
python benchmarks/kernels.py --table results.json                 # the tables again
python benchmarks/kernels.py --predict H200                       # what the roofline model expects, without a device

A layer's update must first be as exact as PyTorch's own operation; one that is not prints FAILED and no time.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from cases import Case

from benchmarks.baselines import DTYPES, LAYOUTS, algorithms, functions, operands, reduced
from benchmarks.networks import DEFAULT_NETWORKS, NETWORKS, kind, layers
from benchmarks.parity import Judge
from benchmarks.predict import costs, predicted_row, rooflines
from benchmarks.records import Records, exit_status, show
from benchmarks.tables import report
from benchmarks.timing import Timer, timer_for
from localsgd_ext import roofline
from localsgd_ext._precision import tf32
from localsgd_ext.train import environment

# An fp64 oracle in a tenth of a second on an H200's fp64 units, in a second or two on two cores.
PARITY_FLOPS = {"cuda": 1e12, "cpu": 4e9}
CPU_BATCH = 32


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--networks", default=",".join(DEFAULT_NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--batch", type=int, help=f"instead of each network's own; {CPU_BATCH} on a CPU")
    parser.add_argument("--layers", default="", metavar="REGEX", help="only layers whose name matches")
    parser.add_argument("--dtypes", default=None, help=f"of {', '.join(DTYPES)}, in that order; bf16,fp32,tf32, on a CPU fp32")
    parser.add_argument("--layouts", default="nhwc,nchw", help="of nhwc, nchw: one in all dtypes, then the other")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further layer after that")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="of a layer; at least 5 rounds, on a CPU 10 of what is not slow"
    )
    parser.add_argument("--threads", type=int, help="of a CPU, instead of as many as PyTorch takes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for a machine with other work; --threads 1 only"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out (c), which takes seconds to compile each time")
    parser.add_argument("--predict", metavar="DEVICE", help=f"one of {', '.join(roofline.DEVICES)}")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="only print the tables of a results file")
    args = parser.parse_args(argv)
    args.networks = args.networks.split(",")
    args.dtypes = (args.dtypes or ("fp32" if args.device == "cpu" and not args.predict else "bf16,fp32,tf32")).split(",")
    args.layouts = args.layouts.split(",")
    for option, known in (("networks", NETWORKS), ("dtypes", DTYPES), ("layouts", LAYOUTS)):
        for value in getattr(args, option):
            if value not in known:
                parser.error(f"--{option} must be of {', '.join(known)}, got {value!r}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        parser.error(f"--cpu-time needs --device cpu --threads 1, got --device {args.device} and {args.threads} threads")
    if args.batch is None and args.device == "cpu" and not args.predict:
        args.batch = CPU_BATCH
    return args


def work(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, tuple[Case, str, str]]]:
    """The networks with their layers' names and counts; every (case, dtype, layout) once, by key."""
    networks, todo = [], {}
    for name in args.networks:
        for batch in (args.batch,) if args.batch else NETWORKS[name].batches:
            listed = [layer for layer in layers(name, batch) if re.search(args.layers, layer.case.name)]
            networks.append({"name": name, "batch": batch, "layers": [(layer.case.name, layer.count) for layer in listed]})
            todo.update({layer.case.name: layer.case for layer in listed})
    keyed = {}
    for layout in args.layouts:
        for dtype in args.dtypes:
            for name, case in todo.items():
                keyed[f"{name}|{dtype}|{layout}"] = case, dtype, layout
    return networks, keyed


def described(case: Case, dtype: str, layout: str, device: roofline.Device) -> dict[str, Any]:
    """``flops`` of a cost are all that ``device`` makes."""
    return {
        "name": case.name,
        "kind": kind(case),
        "dtype": dtype,
        "layout": layout,
        "case": asdict(case),
        "cost": {
            algorithm: asdict(c) | {"flops": c.executed_flops(device)}
            for algorithm, c in costs(case, dtype, layout, device).items()
        },
    }


def measured_row(case: Case, dtype: str, layout: str, timer: Timer, args: argparse.Namespace) -> dict[str, Any]:
    """Parity first. ``us`` is missing where it failed."""
    row: dict[str, Any] = {"roofline_us": {}, "pick": "-"}
    with tf32(dtype == "tf32"):
        torch.backends.cudnn.benchmark = False  # no search for the fastest fp64 oracle
        small = operands(reduced(case, PARITY_FLOPS[args.device]), dtype, layout, args.device)
        judge = Judge(small.case, small.x, small.z, small.weight, small.bias)
        verdicts = {algorithm: judge.update(algorithm) for algorithm in ("auto", *algorithms(case, args.device))}
        row["parity"] = {algorithm: parity.as_json() for algorithm, parity in verdicts.items()}
        row["parity_batch"] = small.case.x[0]
        if failed := [algorithm for algorithm, parity in verdicts.items() if not parity.ok]:
            return {**row, "status": "FAILED", "failed": failed}
        torch.backends.cudnn.benchmark = True
        full = operands(case, dtype, layout, args.device)
        plan = Judge(case, full.x, full.z, full.weight, full.bias).plan()
        row["pick"] = "reference" if plan is None else str(plan.pick)
        if plan:
            row["plan"] = {
                c.algorithm: {"us": c.estimated_us, "configuration": c.configuration} for c in plan.candidates if c.eligible
            }
        timings = timer.measure(functions(full, compiled=not args.no_compile, unfold=args.device == "cpu"), args.seconds)
    row["us"] = {name: timing.us for name, timing in timings.items()}
    row["timer"] = {name: timing.how for name, timing in timings.items()}
    row["runs"] = {name: timing.runs for name, timing in timings.items()}
    bounds = rooflines(case, dtype, layout, timer.device)
    row["roofline_us"] = {algorithm: bounds[algorithm] for algorithm in algorithms(case, args.device)}
    return {**row, "status": "ok"}


def header(args: argparse.Namespace, device: roofline.Device, networks: list[dict[str, Any]]) -> dict[str, Any]:
    sheet = {**asdict(device), "kind": "cuda" if args.predict else args.device}
    command = shlex.join(["python", "benchmarks/kernels.py", *(args.argv or [])])
    clock = "processor time" if args.cpu_time else "wall clock"
    where = {} if args.predict else {**environment.describe(args.device), "clock": clock}
    return {"prediction": bool(args.predict), "command": command, "environment": where, "device": sheet, "networks": networks}


def one_line(row: dict[str, Any]) -> str:
    label = f"{row['name']:34} {row['dtype']:5} {row['layout']:5}"
    if row["status"] != "ok":
        return f"{label} {row['status']} {row.get('failed') or row.get('why')}"
    shown = " ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    return f"{label} {row['pick']:10} us: {shown}"


def measure(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU (--device cpu, or --predict DEVICE)")
    networks, todo = work(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    timer = timer_for(args.device, args.cpu_time)
    records = Records(args.out, header(args, timer.device, networks), resume=args.resume)
    records.save()
    print(f"{len(todo)} layers x dtypes x layouts, {torch.get_num_threads()} threads", file=sys.stderr)
    for key in records.todo(todo, args.budget):
        case, dtype, layout = todo[key]
        try:
            row = measured_row(case, dtype, layout, timer, args)
        except (RuntimeError, ValueError) as error:  # one layer that does not fit into memory is no reason to lose the others
            row = {"status": "ERROR", "why": str(error).splitlines()[0], "pick": "-", "roofline_us": {}}
        records.add(key, {**described(case, dtype, layout, timer.device), **row})
        print(one_line(records.rows[key]), file=sys.stderr, flush=True)
    print(report(records.content), end="")
    return records.exit_status(todo)


def predict(args: argparse.Namespace) -> int:
    device = roofline.device(args.predict)
    networks, todo = work(args)
    records = Records(args.out, header(args, device, networks), resume=args.resume)
    for key, (case, dtype, layout) in todo.items():
        records.rows[key] = {**described(case, dtype, layout, device), **predicted_row(case, dtype, layout, device)}
    records.save()
    print(report(records.content), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a layer failed; 2: wrong arguments, or no such device; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: show(args.table, report) if args.table else predict(args) if args.predict else measure(args))


if __name__ == "__main__":
    sys.exit(main())
