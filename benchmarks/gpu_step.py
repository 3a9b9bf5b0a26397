"""Times whole training steps as people run them on a GPU: autocast, channels_last, with and without torch.compile and CUDA graphs.

python benchmarks/gpu_step.py --out results.json            # again with --resume if it was stopped
python benchmarks/gpu_step.py --table results.json          # the tables again

SGD, a frozen prefix and a local one wear exactly the same dress, on synthetic pictures. A row is a network, a batch and a dress: SGD
and the prefixes of all depths take turns in one process, and medians are compared. Before that a local step must agree with the
reference, and steps in the dress with plain ones.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu
from benchmarks.dress import DTYPES, WARM_UPS, Dress, recorder
from benchmarks.gpu_step_tables import measured_paths, report
from benchmarks.records import Records, exit_status, show
from benchmarks.step_variants import Setting, Variant, calls, example, geometry, kernel, mac_counts, make, network
from benchmarks.timing import Timer, timer_for
from localsgd_ext import reference, trace_layers
from localsgd_ext._precision import tf32
from localsgd_ext.layers import ExecutionPlan
from localsgd_ext.saved import saved_activations
from localsgd_ext.train import environment

SETTINGS = {  # batches follow
    "resnet18": Setting("resnet18", 32, 0, 10),
    "vgg13": Setting("vgg13", 32, 0, 10),
    "resnet34": Setting("resnet34", 224, 0, 1000),
    "resnet50": Setting("resnet50", 224, 0, 1000),
    "mobilenet_v2": Setting("mobilenet_v2", 224, 0, 1000),
}
DRESSES = ("eager", "eager+graph", "compiled", "compiled+graph")
DEPTHS = (0.25, 0.5, 0.75)
METHODS = ("frozen", "local")
LEAST_ROUNDS, STRETCH = 5, 0.05  # seconds of steps between two looks at the clock
PARITY_STEPS, PARITY_LR = WARM_UPS + 2, 1e-3  # one is captured, and the graph used again
ALLOWED = {
    "bf16": {"update": 1e-2, "prefix": 1e-1, "rest": 0.5},
    "tf32": {"update": 2e-3, "prefix": 2e-2, "rest": 0.1},
    "fp32": {"update": 2e-4, "prefix": 2e-3, "rest": 2e-3},
}
"""What :func:`parity` may find. Compiled code rounds to bf16 elsewhere, which gradients show most. A network that
did not learn would be off by 1."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--dresses", default=",".join(DRESSES), help=f"of {', '.join(DRESSES)}")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="shares of the layers that are in the prefix")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="bf16: by autocast; fp32: without tf32")
    parser.add_argument("--image", type=int, metavar="PIXELS", help="instead of each network's own")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=5.0, help=f"of rounds of a row, {LEAST_ROUNDS} at least")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try it out, without graphs")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no further row after that")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="only print the tables of a results file")
    args = parser.parse_args(argv)
    for option, known in (("networks", SETTINGS), ("dresses", DRESSES)):
        values = getattr(args, option).split(",")
        setattr(args, option, values)
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{option} must be of {', '.join(known)}, got {', '.join(unknown)}")
    try:
        args.batches = [int(text) for text in args.batches.split(",")]
        args.depths = sorted(float(text) for text in args.depths.split(","))
    except ValueError as error:
        parser.error(f"--batches and --depths must be numbers with commas between: {error}")
    if min(args.batches) < 2:
        parser.error(f"--batches must be at least 2, which BatchNorm needs, got {args.batches}")
    if not all(0 < value < 1 for value in args.depths):
        parser.error(f"--depths must be in (0, 1), got {args.depths}")
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    return args


def on(device: str, setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and a mini-batch, in channels_last."""
    x, y = example(setting, "nhwc")
    return network(setting, "nhwc").to(device), x.to(device), y.to(device)


def parity(dress: Dress, start: nn.Module, plan: ExecutionPlan, x: Tensor, y: Tensor, boundary: int) -> dict[str, float]:
    """Largest relative errors: ``update``: of a local step of a layer, made plainly, against the reference, given the same operands;
    ``prefix`` and ``rest``: of what some local steps in the dress make of the prefix, layer by layer, and of all other parameters,
    against plain ones."""
    plain = replace(dress, compiled=False, graph=False)
    start = without_dropout(start)
    probe = make("frozen", start, x, boundary, timed=False)
    with plain.autocast():
        recorded = {call.name: call for call in calls(probe, plan, x)}
    before = {name: value.detach().clone() for name, value in start.named_parameters()}
    one = make("local", start, x, boundary, lr=1.0, timed=False)
    plain.step(one, x, y)()
    update = 0.0
    for layer in plan.layers[:boundary]:
        call, weight = recorded[layer], before[f"{layer}.weight"]
        d = reference.correlation(call.x, call.z, weight, algorithm="library", **geometry(call.module)).to(weight.dtype)
        made = one.model.get_submodule(layer).weight.detach() - weight  # type: ignore[operator]
        update = max(update, (made - d / d.norm()).norm().item())
    del recorded, probe, one
    changes = []
    for each in (plain, dress):
        variant = make("local", start, x, boundary, lr=PARITY_LR, timed=False)
        step = each.step(variant, x, y)
        for _ in range(PARITY_STEPS):
            step()
        changes.append({name: value.detach() - before[name] for name, value in variant.model.named_parameters()})
    local = {f"{layer}.weight" for layer in plan.layers[:boundary]}
    prefix = max(_distance(changes[1][name], changes[0][name]) for name in local)
    rest = _distance(*(torch.cat([v.flatten() for name, v in change.items() if name not in local]) for change in changes[::-1]))
    return {"update": update, "prefix": prefix, "rest": rest}


def without_dropout(start: nn.Module) -> nn.Module:
    """A copy: what a compiled step drops is not what a plain one does."""
    start = copy.deepcopy(start)
    for module in start.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return start


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def name_of(method: str, depth: float) -> str:
    return f"{method} {depth:g}"


def measured_row(args: argparse.Namespace, name: str, batch: int, dressed: str, timer: Timer) -> dict[str, Any]:
    """Parity first; ``ms`` is missing where it failed."""
    setting = replace(SETTINGS[name], batch=batch, image=args.image or SETTINGS[name].image)
    dress = Dress(args.device, args.dtype, "compiled" in dressed, "graph" in dressed, args.backend)
    start, x, y = on(args.device, setting)
    plan = trace_layers(start, x[:2])
    boundaries = {depth: int(depth * len(plan)) for depth in args.depths}
    row: dict[str, Any] = {
        "network": name, "batch": batch, "dress": dressed, "image": setting.image, "dtype": args.dtype, "layers": len(plan),
        "backend": args.backend if dress.compiled else None, "seconds": args.seconds,
        "boundaries": {f"{depth:g}": boundary for depth, boundary in boundaries.items()}, "allowed": ALLOWED[args.dtype],
    }  # fmt: skip
    if not all(boundaries.values()):
        return {**row, "status": "FAILED", "failed": f"no layer is in the prefix at depths {args.depths}"}
    forget()
    row["parity"] = errors = parity(dress, start, plan, x, y, boundaries[args.depths[-1]])
    if bad := [which for which, error in errors.items() if not error <= ALLOWED[args.dtype][which]]:  # NaN is bad
        return {**row, "status": "FAILED", "failed": f"wrong: {', '.join(bad)}"}

    forget()
    variants = {"sgd": make("sgd", start, x, 0, timed=False)}
    prefixes: dict[str, list[str]] = {"sgd": []}
    for depth, boundary in boundaries.items():
        for method in METHODS:
            variants[name_of(method, depth)] = make(method, start, x, boundary, timed=False)
            prefixes[name_of(method, depth)] = list(plan.layers[:boundary])
    row |= counted(dress, start, plan, x, boundaries, timer, args.seconds)
    before = {name: value.detach().clone() for name, value in start.named_parameters()}
    steps = {which: dress.step(variant, x, y) for which, variant in variants.items()}
    for step in steps.values():
        for _ in range(WARM_UPS + 1):  # the last one of which is captured
            step()
    row["peak_bytes"] = {which: _peak_bytes(dress, variants[which], step) for which, step in steps.items()}
    row["rounds"], row["ms"] = rounds(dress, steps, args.seconds)
    wrong = {which: bad for which, variant in variants.items() if (bad := mistaken(variant, before, prefixes[which], plan))}
    if wrong:
        del row["ms"]
        return {**row, "status": "FAILED", "failed": "; ".join(f"{which}: {bad}" for which, bad in wrong.items())}
    return {**row, "status": "ok"}


def mistaken(variant: Variant, before: dict[str, Tensor], prefix: Sequence[str], plan: ExecutionPlan) -> str:
    """What a variant that was timed has learnt but should not have, or the other way round; or ``""``."""
    learns = {layer: layer not in prefix or variant.name == "local" for layer in plan.layers}
    for layer, should in learns.items():
        weight = variant.model.get_submodule(layer).weight.detach()
        if torch.equal(weight, before[f"{layer}.weight"]) == should:  # type: ignore[arg-type]
            return f"{layer} {'has not learnt' if should else 'has changed'}"
    return ""


def forget() -> None:
    """What was compiled, and the memory of models that are gone: they are in cycles."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def counted(
    dress: Dress, start: nn.Module, plan: ExecutionPlan, x: Tensor, boundaries: dict[float, int], timer: Timer, seconds: float
) -> dict[str, Any]:
    """By depth (0: SGD): multiply-adds of steps, bytes saved for the backward pass, and what the updates take without a network around
    them, all of them one after the other."""
    plain = replace(dress, compiled=False, graph=False)
    with plain.autocast():
        all_dgrads = {call.name: call.dgrad for call in calls(make("sgd", start, x, 0, timed=False), plan, x)}
    row: dict[str, Any] = {"macs": {}, "saved_bytes": {}, "kernels_ms": {}, "kernels_how": {}}
    for depth, boundary in {0.0: 0, **boundaries}.items():
        variant = make("frozen", start, x, boundary, timed=False) if boundary else make("sgd", start, x, 0, timed=False)
        with plain.autocast(), saved_activations(variant.model) as saved:
            F.cross_entropy(variant.model(x), torch.zeros(len(x), dtype=torch.long, device=x.device))
        row["saved_bytes"][f"{depth:g}"] = saved.total
        if not boundary:
            continue
        with plain.autocast():
            recorded = calls(variant, plan, x)
        prefix = set(plan.layers[:boundary])
        macs = mac_counts(recorded, prefix, all_dgrads)
        row["macs"] |= {"sgd": macs["sgd"], **{name_of(method, depth): macs[method] for method in METHODS}}
        updates = [kernel(call, 1.0) for call in recorded if call.name in prefix]
        timing = timer.measure({"all": lambda u=updates: [f() for f in u]}, seconds / 8)["all"]
        row["kernels_ms"][f"{depth:g}"], row["kernels_how"][f"{depth:g}"] = timing.us / 1e3, timing.how
    return row


def _peak_bytes(dress: Dress, variant: Variant, step: Callable[[], object]) -> int | None:
    """What a step takes at most beyond what there is before it (weights, momentum, the pictures, workspaces of the kernels); ``None`` if it
    cannot be seen."""
    if dress.device != "cuda" or dress.graph:
        return None
    variant.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def rounds(dress: Dress, steps: dict[str, Callable[[], object]], seconds: float) -> tuple[int, dict[str, float]]:
    """How many, and the median milliseconds of a step of each."""

    def taken(step: Callable[[], object], repeats: int) -> float:
        dress.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        dress.synchronize()
        return (time.perf_counter() - start) / repeats

    repeats = {which: max(1, round(STRETCH / taken(step, 2))) for which, step in steps.items()}
    times: dict[str, list[float]] = {which: [] for which in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    begin = time.monotonic()
    while len(times["sgd"]) < LEAST_ROUNDS or time.monotonic() - begin < seconds:
        shuffle(order)
        for which in order:
            times[which].append(taken(steps[which], repeats[which]))
    return len(times["sgd"]), {which: 1e3 * median(values) for which, values in times.items()}


def key_of(args: argparse.Namespace, name: str, batch: int, dress: str) -> str:
    """Of a row: rows of other arguments are others."""
    backend = [args.backend] if "compiled" in dress else []
    return "|".join(map(str, (name, batch, dress, args.dtype, args.image or SETTINGS[name].image, *args.depths, *backend)))


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN searches for the fastest algorithm, for all alike."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def measure(args: argparse.Namespace) -> int:
    if args.device == "cuda" and (why := gpu.missing()):
        raise ValueError(why)
    for dress in args.dresses:
        if "graph" in dress:
            recorder(args.device)
    command = shlex.join(["python", "benchmarks/gpu_step.py", *args.argv])
    header = {"command": command, "environment": environment.describe(args.device), "paths": measured_paths()}
    records = Records(args.out, header, resume=args.resume)
    records.save()
    timer = timer_for(args.device)
    todo = {
        key_of(args, name, batch, dress): (name, batch, dress)
        for dress in args.dresses
        for batch in args.batches
        for name in args.networks
    }
    for key in records.todo(todo, args.budget):
        name, batch, dress = todo[key]
        with warnings.catch_warnings(), tf32(args.dtype != "fp32"), cudnn_benchmark():
            warnings.filterwarnings("error", module="localsgd_ext")  # whatever it has to say would spoil the measurement
            warnings.filterwarnings("ignore", message="torch.compile of PyTorch")  # each has a code object of its own
            try:
                row = measured_row(args, name, batch, dress, timer)
            except (RuntimeError, UserWarning) as error:  # no memory, no capture: the next row may do
                row = {"network": name, "batch": batch, "dress": dress, "status": "ERROR", "why": str(error)}
        forget()
        records.add(key, row)
        print(f"{key}: {row['status']}", file=sys.stderr, flush=True)
    print(report(records.content), end="")
    return records.exit_status(todo)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a step was wrong; 2: wrong arguments or file, or no GPU; 3: the budget ran out."""
    args = arguments(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: show(args.table, report) if args.table else measure(args))


if __name__ == "__main__":
    sys.exit(main())
