"""Whether a GPU is there, and kernels of ours to check on it: without those the reference would be compared with itself.

python benchmarks/gpu.py      # prints what is missing; exit status 0 if nothing is
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch

from localsgd_ext import ops


def no_gpu() -> str:
    """Why there is none, or ``""``."""
    if torch.version.cuda is None:
        return f"a GPU is needed, and a PyTorch with CUDA; this is {torch.__version__}"
    return "" if torch.cuda.is_available() else "a GPU is needed, PyTorch sees none"


def no_kernels() -> str:
    """Why the operations would run on the plain PyTorch reference there, or ``""``."""
    if ops._C is None:
        try:
            importlib.import_module("localsgd_ext._C")
        except ImportError as error:
            return f"the compiled module does not load: {error}"
    return ops.obstacle(torch.empty(0, device="cuda"))


def missing() -> str:
    """What there is to say before anything is checked on a GPU, or ``""``."""
    if why := no_gpu():
        return why
    why = no_kernels()
    return why and f"no kernels of localsgd_ext run on this GPU: {why}"


if __name__ == "__main__":
    if why := missing():
        print(why)
    sys.exit(bool(why))
