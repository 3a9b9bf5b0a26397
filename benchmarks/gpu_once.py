"""Every algorithm once on a few small layers, for compute-sanitizer, which is slow. Checks nothing itself but that it runs.

compute-sanitizer --tool memcheck python benchmarks/gpu_once.py
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from cases import LAYOUTS, with_layout

from benchmarks.gpu_graph import chosen
from localsgd_ext import apply_update_, correlation, hebbian_update_


def run(device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> int:
    """The number of calls made."""
    calls = 0
    for case in chosen():
        for dtype in dtypes:
            for layout in LAYOUTS:
                x, weight, bias = case.sample(torch.float32, device)
                z = with_layout(case.forward(x, weight, bias).to(dtype), layout, case)
                x = with_layout(x.to(dtype), layout, case)
                for algorithm in case.algorithms:
                    if algorithm == "library":  # not ours to check
                        continue
                    given = {"bias": bias, "z_is_output": True, "algorithm": algorithm, **case.arguments}
                    hebbian_update_(weight, x, z, 0.01, **given)
                    d = correlation(x, z, weight, **given)
                    apply_update_([weight, weight.clone()], [d, d], -0.01)
                    calls += 3
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU", file=sys.stderr)
        sys.exit(2)
    try:
        print(f"{run('cuda')} calls")
    except Exception:
        traceback.print_exc()
        sys.exit(7)  # not 1, which may be the sanitizer's own
