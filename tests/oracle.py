"""What kernels are measured against: fp64 correlations and the error of PyTorch's own operations."""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

from localsgd_ext import reference

FP64 = torch.float64


def exact(case: Case, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In fp64: the weight gradient of ``z`` as given; without ``z``, ``W·XXᵀ + b·Σx``."""
    algorithm = "gram" if z is None else "direct"
    wide = [None if t is None else t.to(FP64) for t in (x, z, weight, bias)]
    return reference.correlation(wide[0], wide[1], wide[2], bias=wide[3], algorithm=algorithm, **case.arguments)  # type: ignore[arg-type]


def relative_error(d: Tensor, truth: Tensor) -> float:
    return ((d.to(FP64) - truth).norm() / truth.norm()).item()


def bound(case: Case, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> float:
    """Twice the error of PyTorch's own weight gradient computed in ``dtype`` (without ``z``: of its forward and weight
    gradient), and at least 4 ulp; 16 of fp64, where the oracle's own rounding is part of the difference."""
    narrow = [None if t is None else t.to(dtype) for t in (x, z, weight, bias)]
    theirs = reference.correlation(narrow[0], narrow[1], narrow[2], bias=narrow[3], **case.arguments)  # type: ignore[arg-type]
    return max(
        2 * relative_error(theirs.to(dtype), exact(case, x, z, weight, bias)),
        (16 if dtype == FP64 else 4) * torch.finfo(dtype).eps,
    )
