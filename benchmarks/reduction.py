"""What two processes reduce of the local layers' correlations, and what a step of them takes: all as D, and as Gram matrices where smaller.

python benchmarks/reduction.py                           # gloo over the loopback device, a thread each; minutes
python benchmarks/reduction.py --networks mobilenet_v2 --steps 20

A step is the forward with the local updates of the first three quarters of the layers, without back-propagation, until all weights
are written. Both ways take turns, and the bytes are those of ``ReplicatedModel.traffic``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from benchmarks.networks import NETWORKS
from benchmarks.tables import aligned, times
from localsgd_ext import LocalizedLearning, StaticModeSelection, replicated_sums
from localsgd_ext.distributed import ReplicatedModel, check_replicas
from localsgd_ext.layers import LAYER_TYPES

SHARE = 0.75  # of the layers are local
DEFAULT = ("resnet50", "mobilenet_v2", "convnext_tiny")


@dataclass(frozen=True)
class Row:
    """Of one network; bytes and milliseconds a step and process."""

    network: str
    layers: int
    local: int
    by_gram: int
    """Layers that send Gram matrices."""
    bytes_d: int
    bytes_now: int
    ms_d: float
    ms_now: float
    cpu_ms_d: float
    cpu_ms_now: float
    """Of the first process, with all its threads: what other work on the machine does not lengthen."""


class Way:
    """One of the two ways to train a network's prefix."""

    def __init__(self, network: nn.Module, x: Tensor, *, grams: bool) -> None:
        self.x = x
        self.model = ReplicatedModel(network)
        depth = sum(isinstance(module, LAYER_TYPES) for module in network.modules())
        schedule = StaticModeSelection(kind=lambda epoch: int(SHARE * depth), l_max=SHARE)
        self.local = LocalizedLearning(self.model, None, epochs=2, preset="paper", schedule=schedule, lr=1e-4, supervision=None)
        size = replicated_sums.gram_sums_size
        if not grams:  # never the smaller one
            replicated_sums.gram_sums_size = lambda *_: sys.maxsize
        try:
            self.step()  # in which the processes agree on what is sent, from the next step on
        finally:
            replicated_sums.gram_sums_size = size
        self.before = self.model.traffic

    def step(self) -> tuple[float, float]:
        """Milliseconds that pass, and of computing."""
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        self.model(self.x)
        self.model.flush()
        return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu_start)

    @property
    def by_gram(self) -> int:
        sums = self.local._updater and self.local._updater._sums
        assert sums is not None
        return len(sums.grams)

    def bytes_per_step(self) -> int:
        now = self.model.traffic
        return (now.correlations - self.before.correlations) // (now.steps - self.before.steps)


def measure(network: str, image: int, batch: int, steps: int) -> Row:
    """In every process alike."""
    ways = []
    for grams in (False, True):
        torch.manual_seed(0)
        built = NETWORKS[network].build()
        torch.manual_seed(1 + dist.get_rank())
        ways.append(Way(built, torch.randn(batch, 3, image, image), grams=grams))
    taken: list[list[tuple[float, float]]] = [[], []]
    for i in range(steps):
        for which in ((0, 1), (1, 0))[i % 2]:
            taken[which].append(ways[which].step())
    for way in ways:
        check_replicas(way.local)
    d, now = ways
    return Row(
        network,
        now.local.num_layers,
        now.local.boundary,
        now.by_gram,
        d.bytes_per_step(),
        now.bytes_per_step(),
        *(statistics.median(each[kind] for each in found) for kind in (0, 1) for found in taken),
    )


def _process(rank: int, directory: str, args: argparse.Namespace) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    rows = [measure(network, args.image, args.batch, args.steps) for network in args.networks]
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()  # neither goes while the other still talks to it
    dist.destroy_process_group()


def table(rows: Sequence[Row]) -> str:
    lines = [
        (
            "network",
            "layers local",
            "by Gram",
            "KB a step, all D",
            "KB",
            "ratio",
            "ms a step, all D",
            "ms",
            "CPU ms, all D",
            "CPU ms",
        )
    ]
    for row in rows:
        lines.append(
            (
                row.network,
                f"{row.local} of {row.layers}",
                str(row.by_gram),
                f"{row.bytes_d / 1e3:.0f}",
                f"{row.bytes_now / 1e3:.0f}",
                times(row.bytes_d / row.bytes_now),
                f"{row.ms_d:.0f}",
                f"{row.ms_now:.0f}",
                f"{row.cpu_ms_d:.0f}",
                f"{row.cpu_ms_now:.0f}",
            )
        )
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(DEFAULT), choices=list(NETWORKS))
    parser.add_argument("--image", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="pictures a process")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args(argv)
    for name in ("image", "batch", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_process, (directory, args), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
        rows = [Row(**row) for row in json.loads(Path(directory, "rows.json").read_text())]
    print(
        f"Two processes on gloo over the loopback device, one thread each; {args.image} pixels, {args.batch} pictures a process, medians of "
        f"{args.steps} steps; torch {torch.__version__}.\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
