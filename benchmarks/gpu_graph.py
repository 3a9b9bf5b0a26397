"""Hundreds of updates in a captured CUDA graph, replayed while lr and its sign change on the device: bits as in eager mode.

python benchmarks/gpu_graph.py --out graph.json [--resume] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from cases import CASES, Case, with_layout
from torch import Tensor

from benchmarks import gpu
from benchmarks.records import Records
from localsgd_ext import hebbian_update_
from localsgd_ext.train import environment

UPDATES = 200
RATES = (0.01, -0.005, 0.0, 0.02, -0.01)


def chosen() -> tuple[Case, ...]:
    """One of each kind, some with ragged sizes."""
    names = (
        "conv3x3",
        "conv3x3-odd-channels",
        "first3x3",
        "expand1x1",
        "square1x1-odd",
        "depthwise3x3",
        "linear",
        "grouped3x3",
        "conv3d",
    )
    return tuple(case for case in CASES if case.name in names)


def stepper(case: Case, algorithm: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Callable[[], None]]:
    """The weight, lr, count of skipped steps, and a function that makes one update, all on ``device``."""
    x, weight, bias = case.sample(torch.float32, device)
    z = with_layout(case.forward(x, weight, bias).to(dtype), "channels_last", case)
    x = with_layout(x.to(dtype), "channels_last", case)
    lr = torch.zeros((), device=device)
    skipped = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> None:
        hebbian_update_(weight, x, z, lr, bias=bias, z_is_output=True, algorithm=algorithm, skipped=skipped, **case.arguments)

    return weight, lr, skipped, step


def graph_equals_eager(case: Case, algorithm: str, dtype: torch.dtype, updates: int = UPDATES) -> bool:
    """``updates`` of them in one graph, one replay for each of ``RATES``."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # where ``library`` runs, the same bits are expected of it
    try:
        return _graph_equals_eager(case, algorithm, dtype, updates)
    finally:
        torch.backends.cudnn.deterministic = before


def _graph_equals_eager(case: Case, algorithm: str, dtype: torch.dtype, updates: int) -> bool:
    weight, lr, skipped, step = stepper(case, algorithm, dtype, "cuda")
    start = weight.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # workspaces and library handles exist from here on
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(updates):
            step()
    weight.copy_(start)
    skipped.zero_()
    for rate in RATES:
        lr.fill_(rate)
        graph.replay()
    replayed, counted = weight.clone(), skipped.clone()
    weight.copy_(start)
    skipped.zero_()
    for rate in RATES:
        lr.fill_(rate)
        for _ in range(updates):
            step()
    return torch.equal(weight, replayed) and torch.equal(skipped, counted) and not torch.equal(weight, start)


def row(case: Case, algorithm: str, dtype: torch.dtype, updates: int) -> dict[str, str]:
    try:
        return {"status": "ok" if graph_equals_eager(case, algorithm, dtype, updates) else "DIFFERENT"}
    except RuntimeError as error:
        return {"status": "ERROR", "why": str(error).splitlines()[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """0: all equal; 1: some differ; 2: wrong arguments, or no GPU with our kernels; 3: the budget ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--updates", type=int, default=UPDATES)
    args = parser.parse_args(argv)
    if why := gpu.missing():
        print(why, file=sys.stderr)
        return 2
    try:
        records = Records(args.out, {"environment": environment.describe("cuda")}, resume=args.resume)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    planned = {
        f"{case.name}|{algorithm}|{dtype}|{args.updates} updates": (case, algorithm, dtype, args.updates)
        for case in chosen()
        for algorithm in ("auto", *case.algorithms)
        for dtype in (torch.float32, torch.bfloat16)
    }
    for key in records.todo(planned, args.budget):
        records.add(key, row(*planned[key]))
        if not records.done(key):
            print(key, records.rows[key], file=sys.stderr, flush=True)
    print(f"{sum(map(records.done, planned))} of {len(planned)} graphs of {args.updates} updates give the bits of eager mode")
    return records.exit_status(planned)


if __name__ == "__main__":
    sys.exit(main())
