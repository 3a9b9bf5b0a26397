"""Every algorithm once in every dtype on a few small layers, for compute-sanitizer, which is slow. Checks nothing itself but that
it runs. Exit status 0: it did; 7: it did not, for whatever reason.

compute-sanitizer --tool memcheck --kernel-name kns=localsgd python benchmarks/gpu_once.py
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

FAILED = 7  # not Python's own 1 and 2, nor what the sanitizer is told to return
DTYPES = ("fp32", "tf32", "bf16", "fp16")  # fp32: on fused multiply-adds


def run(device: str, dtypes: Sequence[str] = DTYPES) -> int:
    """The number of calls made."""
    # Here, so that one that fails has the exit status of all that fails.
    import torch
    from cases import LAYOUTS, with_layout

    from benchmarks import baselines, gpu
    from benchmarks.gpu_graph import chosen
    from localsgd_ext import apply_update_, correlation, hebbian_update_
    from localsgd_ext._precision import tf32

    if device == "cuda" and (why := gpu.missing()):
        raise RuntimeError(why)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        """On the device with the same strides, by a copy of the memory: initcheck sees that, and no kernel of PyTorch runs."""
        memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    calls = 0
    for case in chosen():
        for name in dtypes:
            dtype = baselines.DTYPES[name]
            for layout in LAYOUTS:
                x, weight, bias = case.sample(torch.float32, "cpu")
                z = copied(with_layout(case.forward(x, weight, bias).to(dtype), layout, case))
                x = copied(with_layout(x.to(dtype), layout, case))
                weight, bias = copied(weight), None if bias is None else copied(bias)
                for algorithm in case.algorithms:
                    if algorithm == "library":  # not ours to check
                        continue
                    given = {"bias": bias, "z_is_output": True, "algorithm": algorithm, **case.arguments}
                    with tf32(name == "tf32"):
                        hebbian_update_(weight, x, z, 0.01, **given)
                        d = correlation(x, z, weight, **given)
                        apply_update_([weight, weight.clone()], [d, d], -0.01)
                    calls += 3
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    try:
        print(f"{run('cuda')} calls")
    except BaseException:
        traceback.print_exc()
        sys.exit(FAILED)
