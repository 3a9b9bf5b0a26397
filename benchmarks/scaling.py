"""What data parallel training of ResNet-50 would cost on 8 to 1024 GPUs: bytes and time of a step by arithmetic. Nothing is measured.

python benchmarks/scaling.py                # ResNet-50, 64 pictures a GPU, the numbers below as assumptions
python benchmarks/scaling.py --inter 10     # a slower network between nodes, GB/s a GPU

A step is simulated: layers compute one after the other, their gradients and correlations fill buckets, and a link that sends one
bucket at a time starts with each as soon as it is full. What the link still has to do when the last layer is done is waited for.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch

from benchmarks.tables import aligned, times
from localsgd_ext import StaticModeSelection, roofline, trace_layers
from localsgd_ext.learning import PRESETS
from localsgd_ext.train import models
from localsgd_ext.train.measure import multiply_adds

BYTES = 4  # gradients and correlations are fp32
GRADIENT_BUCKET, CORRELATION_BUCKET = 25 << 20, 1 << 20  # as DistributedDataParallel and ReplicatedModel have them


@dataclass(frozen=True)
class Layer:
    """Of one picture: multiply-adds of its forward; and what is reduced: bytes of its weight, and of all that is trained with it."""

    forward: float
    weight: int
    trained: int


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them. ``intra`` and ``inter``: bytes a second and GPU that an all-reduce moves within and between nodes."""

    flops_per_s: float
    intra: float
    inter: float
    latency_s: float
    gpus_per_node: int

    def seconds(self, multiply_adds: float) -> float:
        return 2 * multiply_adds / self.flops_per_s

    def all_reduce(self, size: float, gpus: int) -> float:
        """A ring moves every byte twice, less a share; its latency grows by a tree, as the library's does."""
        if gpus == 1:
            return 0.0
        slowest = self.intra if gpus <= self.gpus_per_node else min(self.intra, self.inter)
        return 2 * (gpus - 1) / gpus * size / slowest + math.ceil(math.log2(gpus)) * self.latency_s


@dataclass(frozen=True)
class Step:
    seconds: float
    waited: float
    """Of them, for the link."""
    size: float
    """Bytes reduced."""


class Link:
    """Sends buckets one after the other."""

    def __init__(self, machine: Machine, gpus: int, bucket: int) -> None:
        self.machine, self.gpus, self.bucket = machine, gpus, bucket
        self.free = 0.0
        self.size = 0.0
        self._waiting = 0.0

    def add(self, size: float, now: float) -> None:
        self._waiting += size
        if self._waiting >= self.bucket:
            self.send(now)

    def send(self, now: float) -> None:
        if self._waiting:
            self.free = max(self.free, now) + self.machine.all_reduce(self._waiting, self.gpus)
            self.size += self._waiting
            self._waiting = 0.0


def step(
    layers: Sequence[Layer], boundary: int, machine: Machine, gpus: int, batch: int, *, local: bool, sync: bool = True
) -> Step:
    """One training step with ``boundary`` layers in the prefix, which make local updates if ``local``, reduced if ``sync``."""
    link = Link(machine, gpus, CORRELATION_BUCKET)
    now = 0.0
    for i, layer in enumerate(layers):
        now += machine.seconds(batch * layer.forward)
        if local and i < boundary:
            now += machine.seconds(batch * layer.forward)  # one product more
            if sync:
                link.add(layer.weight, now)
    link.send(now)
    link.bucket = GRADIENT_BUCKET
    for i in reversed(range(boundary, len(layers))):
        now += machine.seconds(batch * layers[i].forward * (1 if i == boundary else 2))
        link.add(layers[i].trained, now)
    link.send(now)
    return Step(max(now, link.free), max(0.0, link.free - now), link.size)


def mean(steps: Sequence[Step]) -> Step:
    n = len(steps)
    return Step(sum(s.seconds for s in steps) / n, sum(s.waited for s in steps) / n, sum(s.size for s in steps) / n)


def resnet50(image: int = 224) -> list[Layer]:
    """Traced without weights or pictures."""
    with torch.device("meta"):
        model = models.MODELS["resnet50"](1000)
    x = torch.empty(2, 3, image, image, device="meta")
    plan = trace_layers(model, x)
    with torch.no_grad(), multiply_adds(model.requires_grad_(False)) as counted:
        model(x)
    parameters = dict(model.named_parameters())
    found, before = [], 0
    for boundary, name in enumerate(plan.layers, start=1):
        if boundary < len(plan):
            upto = sum(parameters[p].numel() for p in plan.prefix(plan.parameters, boundary))
        else:
            upto = sum(p.numel() for p in parameters.values())
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        found.append(Layer(counted.by_layer[name] / len(x), BYTES * weight.numel(), BYTES * (upto - before)))
        before = upto
    return found


def methods(layers: Sequence[Layer], machine: Machine, gpus: int, batch: int, epochs: int) -> dict[str, Step]:
    """The mean step of a whole run, with the schedule of ``preset="refresh"`` but for SGD."""
    preset = PRESETS["refresh"]
    schedule = StaticModeSelection(len(layers), epochs, kind=preset["schedule"], l_max=preset["l_max"])
    boundaries = [schedule.at(epoch) for epoch in range(epochs)]

    def run(every: int = 0, *, local: bool = False, sync: int = 1) -> Step:
        """One in ``every`` steps goes through the prefix; one in ``sync`` reduces correlations."""
        found = []
        for boundary in boundaries:
            cycle = math.lcm(every or 1, sync)
            for i in range(cycle):
                refreshing = every > 0 and i % every == every - 1
                found.append(
                    step(
                        layers,
                        0 if refreshing else boundary,
                        machine,
                        gpus,
                        batch,
                        local=local and not refreshing,
                        sync=i % sync == sync - 1,
                    )
                )
        return mean(found)

    return {
        "SGD": step(layers, 0, machine, gpus, batch, local=False),
        "frozen": run(),
        f"refresh 1/{preset['refresh']}": run(preset["refresh"]),
        "Hebbian": run(local=True),
        "Hebbian, sync=16": run(local=True, sync=16),
    }


def report(args: argparse.Namespace) -> str:
    layers = resnet50()
    device = roofline.device(args.device)
    machine = Machine(
        args.efficiency * device.peak(args.dtype), args.intra * 1e9, args.inter * 1e9, args.latency * 1e-6, args.gpus_per_node
    )
    preset = PRESETS["refresh"]
    lines = [
        f"**PREDICTION by arithmetic, nothing measured.** ResNet-50, 224 pixels, {args.batch} pictures a GPU, run of {args.epochs} epochs, "
        f"boundary by the {preset['schedule']} schedule to {preset['l_max']:.0%}.",
        f"Assumed: {args.device}s that reach {args.efficiency:.0%} of their {args.dtype} peak; all-reduce at {args.intra:g} GB/s a GPU "
        f"among the {args.gpus_per_node} of a node, {args.inter:g} between nodes, {args.latency:g} µs times log2 of the GPUs each; fp32 "
        "gradients and correlations; no time for anything but convolutions, the linear layer and all-reduce; no jitter.",
    ]
    table = [("GPUs", "method", "MB reduced a step", "step, ms", "waited for the link, ms", "speed-up over SGD", "images/s")]
    for gpus in args.gpus:
        found = methods(layers, machine, gpus, args.batch, args.epochs)
        for name, each in found.items():
            table.append(
                (
                    str(gpus),
                    name,
                    f"{each.size / 1e6:.1f}",
                    f"{1e3 * each.seconds:.2f}",
                    f"{1e3 * each.waited:.2f}",
                    times(found["SGD"].seconds / each.seconds),
                    f"{gpus * args.batch / each.seconds:.0f}",
                )
            )
    return "\n\n".join([*lines, aligned(table)]) + "\n"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--device", default="H200", choices=roofline.DEVICES)
    parser.add_argument("--dtype", default="bf16", choices=roofline.UNITS)
    parser.add_argument("--efficiency", type=float, default=0.3, help="share of the peak that convolutions reach")
    parser.add_argument("--batch", type=int, default=64, help="pictures a GPU")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--intra", type=float, default=300, help="GB/s a GPU, all-reduce within a node")
    parser.add_argument(
        "--inter", type=float, default=40, help="GB/s a GPU, all-reduce between nodes (400 Gbit/s each, 80 %% of it)"
    )
    parser.add_argument("--latency", type=float, default=15, help="µs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    args = parser.parse_args(argv)
    for name in ("efficiency", "batch", "epochs", "intra", "inter", "gpus_per_node"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if min(args.gpus) < 1:
        parser.error(f"--gpus must be at least 1, got {min(args.gpus)}")
    if args.latency < 0:
        parser.error(f"--latency must be at least 0, got {args.latency}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    print(report(arguments(argv)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
