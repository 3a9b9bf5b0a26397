"""The paper's tables and figures: trains what they need, in order, and draws them up from what was kept.

python benchmarks/paper.py pareto --scale cpu --budget 3600       # again after a kill: it goes on where it was
python benchmarks/paper.py pareto --scale cpu --timing 3          # on a quiet machine: the times of the steps
python benchmarks/paper.py pareto --scale cpu --table             # tables and pictures again, from the JSON alone
python benchmarks/paper.py table2 --scale full --data cifar10 --root ~/data

Experiments share their runs. Several processes may work at once, each takes what no other has. Runs under way lie in --work, what is
kept of finished ones in --out/SCALE.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from rich.console import Console

from benchmarks import ROOT
from benchmarks.experiments import section2, suite, timing
from benchmarks.experiments.runner import Bar, Job, Lines, Runner, unfinished
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Result, Store
from benchmarks.experiments.timing import Timings
from localsgd_ext.train.config import DATA_SETS, RunConfig
from localsgd_ext.train.files import write_atomically


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help=f"all, or of {', '.join(suite.EXPERIMENTS)}")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--seeds", type=int, help="instead of the scale's number; the tables have it in their names")
    parser.add_argument("--data", choices=DATA_SETS, help="instead of the scale's")
    parser.add_argument("--root", help="where cifar10, cifar100 or imagenet lie")
    parser.add_argument("--models", default="", help="only these, comma-separated")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of every run, as epochs=90"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="train only cells whose name (see --list) it matches")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further cell after that")
    parser.add_argument("--timing", type=float, metavar="SECONDS", help="train nothing; time the steps that finished runs made")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--list", action="store_true", help="only name the cells that are not finished")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "paper")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "paper")
    args = parser.parse_args(argv)
    if args.experiments == ["all"]:
        args.experiments = list(suite.EXPERIMENTS)
    for name in args.experiments:
        if name not in suite.EXPERIMENTS:
            parser.error(f"EXPERIMENT must be all or of {', '.join(suite.EXPERIMENTS)}, got {name!r}")
    try:
        args.flags = dict(_option(text) for text in args.set)
    except ValueError as error:
        parser.error(str(error))
    return args


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in {field.name for field in dataclasses.fields(RunConfig)}:
        raise ValueError(f"--set must be OPTION=VALUE, with an option of localsgd train, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def run(args: argparse.Namespace) -> int:
    study = Study(SCALES[args.scale], args.data, args.root, tuple(filter(None, args.models.split(","))), args.flags, args.seeds)
    out = args.out / args.scale
    store = Store(out)
    cells = [cell for name in args.experiments for cell in suite.EXPERIMENTS[name].cells(study)]
    if args.models and not cells:
        raise ValueError(f"--models {args.models}: scale {args.scale} has none of them")
    if args.list:
        for cell in cells:
            if cell.missing:
                print(f"{cell.name}: {cell.missing}")
        for cell in unfinished(cells, store, args.only):
            print(cell.name)
        return 0
    torch.set_num_threads(args.threads)
    failed: dict[str, str] = {}
    left = []
    if args.timing is not None:
        _time(args, study, [result for cell in cells if (result := store.get(cell)) is not None], out)
    elif not args.table:
        _check_machine(study)
        runner = Runner(store, args.work / args.scale, _display)
        left, failed = runner.run(cells, args.only, args.budget), runner.failed
    timings = Timings.read(out)
    for name in args.experiments:
        report = suite.report(name, study, store, timings)
        print(report)
        runs = suite.finished(suite.EXPERIMENTS[name].cells(study), store)
        if runs:
            file = _file(name, args, study)
            write_atomically(out / f"{file}.md", report.encode())
            draw = suite.EXPERIMENTS[name].picture
            if draw is not None:
                write_atomically(out / f"{file}.png", draw(study, runs, timings))
    for cell_name, why in failed.items():
        print(f"{cell_name} failed: {why}", file=sys.stderr)
    if failed:
        return 1
    if left:
        print(f"{len(left)} runs are left: the same command goes on", file=sys.stderr)
    return 3 if left else 0


def _file(name: str, args: argparse.Namespace, study: Study) -> str:
    """Without an ending. All that decides what a table shows is in it, so that none overwrites another."""
    seeds = study.asked_seeds(pareto=suite.EXPERIMENTS[name].pareto)
    return "-".join([name, *filter(None, [args.data, args.models, *args.set, "" if seeds is None else f"seeds={seeds}"])])


def _check_machine(study: Study) -> None:
    device = {**study.scale.flags, **study.flags}["device"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"scale {study.scale.name} trains on {device}, PyTorch sees none here; --set device=cpu is slow")


def _display(total: int) -> Job:
    """On standard error: the tables are what the command prints."""
    console = Console(stderr=True)
    return Bar(total, console) if console.is_terminal else Lines(total, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _time(args: argparse.Namespace, study: Study, results: Sequence[Result], out: Path) -> None:
    timing.measure(results, out, args.timing, args.root, _say)
    if "section2" in args.experiments:
        section2.measure(study, suite.EXPERIMENTS["section2"].networks(study), out, args.timing, _say)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a run failed; 2: wrong arguments or file; 3: runs are left; 130: interrupted."""
    args = arguments(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("Stopped: the same command goes on from the last epoch.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
