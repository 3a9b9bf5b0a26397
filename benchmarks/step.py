"""Times one training step, phase by phase: SGD, a frozen prefix, a local prefix, and the local one as a user would write it.

python benchmarks/step.py --threads 2 --out results.json     # again with --resume if it was stopped
python benchmarks/step.py --table results.json               # the tables again

All variants take turns in one process; medians are compared. Each must first agree with the reference on one step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from torch import Tensor, nn

from benchmarks.records import Records, exit_status, show
from benchmarks.step_tables import report
from benchmarks.step_variants import (
    ALLOWED,
    LAYOUTS,
    SAMPLES,
    SETTINGS,
    VARIANTS,
    Variant,
    calls,
    example,
    kernel,
    mac_counts,
    make,
    network,
    no_kernel,
    parity,
)
from benchmarks.timing import CpuTimer
from localsgd_ext import HebbianUpdater, trace_layers
from localsgd_ext.train import environment

FRACTIONS = (0.25, 0.5, 0.75)
LEAST_ROUNDS = 5


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--depths", default=",".join(map(str, FRACTIONS)), help="shares of the layers that are in the prefix")
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--image", type=int, metavar="PIXELS", help="instead of each network's own")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help=f"of rounds of a row, {LEAST_ROUNDS} at least, and again of pairs"
    )
    parser.add_argument("--threads", type=int, help="instead of as many as PyTorch takes")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further row after that")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="only print the tables of a results file")
    args = parser.parse_args(argv)
    args.networks, args.layouts = args.networks.split(","), args.layouts.split(",")
    args.depths = [float(text) for text in args.depths.split(",")]
    for option, known in (("networks", SETTINGS), ("layouts", LAYOUTS)):
        for value in getattr(args, option):
            if value not in known:
                parser.error(f"--{option} must be of {', '.join(known)}, got {value!r}")
    if not all(0 < value < 1 for value in args.depths):
        parser.error(f"--depths must be in (0, 1), got {args.depths}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    return args


LAYERS_ALONE, CALLS_ALONE = 16, 300


def hook_alone_us() -> dict[str, dict[str, float]]:
    """What our hook around no kernel adds to a layer's forward, and what a hook that does nothing adds, by kind of layer: chains of
    tiny ones, with and without, in turn. After a slow forward the interpreter finds its caches cold, whatever a hook does."""
    kinds: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "3x3": (lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False), (1, 4, 4, 4)),
        "1x1": (lambda: nn.Conv2d(4, 4, 1, bias=False), (1, 4, 4, 4)),
        "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (1, 4, 4, 4)),
        "linear": (lambda: nn.Linear(4, 4), (1, 4)),
    }
    costs = {}
    for kind, (layer, shape) in kinds.items():
        chains = {
            which: nn.Sequential(*(layer() for _ in range(LAYERS_ALONE))).requires_grad_(False)
            for which in ("none", "ours", "empty")
        }
        updater = HebbianUpdater(chains["ours"])
        updater.enable(str(index) for index in range(LAYERS_ALONE))
        for module in chains["empty"]:
            module.register_forward_hook(lambda _module, _args, _output: None)
        x = torch.randn(shape)
        times: dict[str, list[float]] = {which: [] for which in chains}
        with no_kernel():
            for _ in range(CALLS_ALONE):
                for which, chain in chains.items():
                    start = time.perf_counter()
                    chain(x)
                    times[which].append(time.perf_counter() - start)
        without = median(times["none"])
        costs[kind] = {which: 1e6 * (median(times[which]) - without) / LAYERS_ALONE for which in ("ours", "empty")}
    return costs


def over_frozen_ms(frozen: Variant, local: Variant, x: Tensor, y: Tensor, seconds: float) -> list[float]:
    """What the local step takes longer than the frozen one, pair by pair; what comes first takes turns."""
    differences: list[float] = []
    begin = time.monotonic()
    while len(differences) < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        order = (frozen, local) if len(differences) % 2 else (local, frozen)
        taken = {variant.name: variant.step(x, y)["step"] for variant in order}
        differences.append(1e3 * (taken["local"] - taken["frozen"]))
    return differences


def measured_row(args: argparse.Namespace, name: str, layout: str, fraction: float, timer: CpuTimer) -> dict[str, Any]:
    """Parity first; ``ms`` is missing where it failed."""
    setting = SETTINGS[name]
    changed = {key: value for key in ("batch", "image") if (value := getattr(args, key)) is not None}
    setting = type(setting)(**{**vars(setting), **changed})
    x, y = example(setting, layout)
    start = network(setting, layout)
    plan = trace_layers(start, x)
    boundary = int(fraction * len(plan))
    row: dict[str, Any] = {
        "network": name, "layout": layout, "depth": fraction, "boundary": boundary, "layers": len(plan),
        "batch": setting.batch, "image": setting.image, "allowed": ALLOWED
    }  # fmt: skip
    row["parity"] = parity(start, plan, x, y, boundary)
    if not all(error <= ALLOWED for error in row["parity"].values()):  # NaN fails
        return {**row, "status": "FAILED"}
    variants = [make(variant, start, x, boundary) for variant in VARIANTS]
    all_dgrads = {call.name: call.dgrad for call in calls(variants[0], plan, x)}
    recorded = calls(variants[1], plan, x)
    prefix = set(plan.layers[:boundary])
    row["macs"] = mac_counts(recorded, prefix, all_dgrads)

    one_round = time.monotonic()
    for variant in variants:
        variant.step(x, y)
    one_round = time.monotonic() - one_round
    rounds = max(LEAST_ROUNDS, int(args.seconds / one_round))
    times: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            times[variant.name].append(variant.step(x, y))
    row["rounds"] = rounds
    row["ms"] = {
        variant: {phase: 1e3 * median(step[phase] for step in steps) for phase in steps[0]} for variant, steps in times.items()
    }
    by_name = {variant.name: variant for variant in variants}
    row["over_frozen_ms"] = over_frozen_ms(by_name["frozen"], by_name["local"], x, y, args.seconds)
    local = [call for call in recorded if call.name in prefix]
    row["kernels_ms"] = {}
    for variant, sample in SAMPLES.items():
        functions = {call.name: kernel(call, sample) for call in local}
        timings = timer.measure(functions, args.seconds / 8)
        row["kernels_ms"][variant] = sum(timing.us for timing in timings.values()) / 1e3
        if variant == "local":
            row["kernel_us"] = {layer: timing.us for layer, timing in timings.items()}
    row["hook_us"] = 1e3 * row["ms"]["no-op"]["hooks"] / boundary
    return {**row, "status": "ok"}


def measure(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    timer = CpuTimer()
    command = shlex.join(["python", "benchmarks/step.py", *args.argv])
    header = {"command": command, "environment": environment.describe("cpu"), "hook_alone_us": {}}
    records = Records(args.out, header, resume=args.resume)
    records.content["hook_alone_us"] = hook_alone_us()
    records.save()
    todo = {
        f"{name}|{layout}|{fraction}": (name, layout, fraction)
        for name in args.networks
        for layout in args.layouts
        for fraction in args.depths
    }
    for key in records.todo(todo, args.budget):
        name, layout, fraction = todo[key]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # whatever the library has to say would spoil the measurement
            records.add(key, measured_row(args, name, layout, fraction, timer))
        print(f"{key}: {records.rows[key]['status']}", file=sys.stderr, flush=True)
    print(report(records.content), end="")
    return records.exit_status(todo)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a step was wrong; 2: wrong arguments or file; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: show(args.table, report) if args.table else measure(args))


if __name__ == "__main__":
    sys.exit(main())
