"""Every case of tests/cases.py x algorithm x dtypes x layout: at most twice the error of PyTorch's own operation, or 4 ulp (one
of tf32), against fp64.

python benchmarks/gpu_parity.py --device cuda --out parity.json [--resume] [--budget SECONDS] [--cases REGEX] [--jobs PROCESSES]
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from cases import CASES, LAYOUTS, Case, with_layout
from oracle import FP64

from benchmarks import gpu
from benchmarks.baselines import algorithms
from benchmarks.parity import Judge, Parity
from benchmarks.records import Records
from localsgd_ext._precision import tf32
from localsgd_ext.train import environment

SAVE_EVERY = 3.0  # seconds; all rows are a megabyte

# Of x and z, and whether fp32 may be rounded to tf32; parameters are fp32, or fp64 beside fp64.
DTYPES = {
    "fp32": (torch.float32, torch.float32, False),
    "tf32": (torch.float32, torch.float32, True),
    "bf16": (torch.bfloat16, torch.bfloat16, False),
    "fp16": (torch.float16, torch.float16, False),
    "fp64": (FP64, FP64, False),
    "fp32-bf16": (torch.float32, torch.bfloat16, False),
    "fp16-fp32": (torch.float16, torch.float32, False),
}


Planned = dict[str, tuple[Case, str, str]]


def todo(pattern: str = "") -> Iterator[tuple[str, Case, str, str]]:
    for case in CASES:
        if re.search(pattern, case.name):
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    yield f"{case.name}|{dtype}|{layout}", case, dtype, layout


def judge(case: Case, dtype: str, layout: str, device: str) -> dict[str, Parity]:
    """The correlation by each algorithm, and the update with ``auto``'s."""
    x_dtype, z_dtype, rounded = DTYPES[dtype]
    x, weight, bias = case.sample(FP64, device)
    z = case.forward(x, weight, bias).to(z_dtype)
    parameters = FP64 if FP64 in (x_dtype, z_dtype) else torch.float32
    weight, bias = weight.to(parameters), None if bias is None else bias.to(parameters)
    with tf32(rounded):
        judge = Judge(case, with_layout(x.to(x_dtype), layout, case), with_layout(z, layout, case), weight, bias)
        return {algorithm: judge.correlation(algorithm) for algorithm in algorithms(case, device)} | {
            "update": judge.update("auto")
        }


def row(case: Case, dtype: str, layout: str, device: str) -> dict[str, Any]:
    try:
        verdicts = judge(case, dtype, layout, device)
    except (RuntimeError, ValueError, TypeError) as error:
        return {"status": "ERROR", "why": str(error).splitlines()[0]}
    failed = [algorithm for algorithm, parity in verdicts.items() if not parity.ok]
    return {
        "status": "FAILED" if failed else "ok",
        "failed": failed,
        "parity": {algorithm: parity.as_json() for algorithm, parity in verdicts.items()},
    }


def quietly(case: Case, dtype: str, layout: str, device: str) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
    return row(case, dtype, layout, device)


def rows(keys: Iterable[str], planned: Planned, device: str, jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of ``keys``, which are taken as processes get free: most of a row is waiting for small kernels."""
    if jobs == 1:
        for key in keys:
            yield key, quietly(*planned[key], device)
        return
    running: dict[Future[dict[str, Any]], str] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:  # CUDA does not survive a fork
        for key in keys:
            running[pool.submit(quietly, *planned[key], device)] = key
            if len(running) >= 2 * jobs:
                yield from _finished(running, FIRST_COMPLETED)
        yield from _finished(running, "ALL_COMPLETED")


def _finished(running: dict[Future[dict[str, Any]], str], when: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for future in wait(running, return_when=when).done:
        yield running.pop(future), future.result()


def main(argv: Sequence[str] | None = None) -> int:
    """0: all agree; 1: some do not; 2: wrong arguments, or no such device; 3: the budget ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is tried again")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--jobs", type=int, default=1, metavar="PROCESSES", help="that share the device")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be positive, got {args.jobs}")
    if args.device == "cuda" and (why := gpu.missing()):
        print(f"--device cuda: {why}", file=sys.stderr)
        return 2
    try:
        records = Records(args.out, {"environment": environment.describe(args.device)}, resume=args.resume)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    planned = {key: (case, dtype, layout) for key, case, dtype, layout in todo(args.cases)}
    try:
        for key, result in rows(records.todo(planned, args.budget), planned, args.device, args.jobs):
            records.add(key, result, every=SAVE_EVERY)
            if not records.done(key):
                print(key, records.rows[key], file=sys.stderr, flush=True)
    finally:  # a process that dies ends this one
        records.save()
    print(f"{sum(map(records.done, planned))} of {len(planned)} agree with fp64")
    return records.exit_status(planned)


if __name__ == "__main__":
    sys.exit(main())
