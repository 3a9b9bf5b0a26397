"""Layers on the GPU, as the tests here use them; with ``--emulated``, on the emulated one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES, Case, with_layout
from torch import Tensor

from localsgd_ext import correlation, hebbian_update_, ops

DEVICE = getattr(ops._C, "gpu", None) or "cuda"  # an emulated GPU computes on the CPU's tensors

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LOW = (torch.float32, torch.bfloat16, torch.float16)
ELIGIBLE = [(case, algorithm) for case in CASES for algorithm in case.algorithms]

# One of each kind, ragged: for what does not depend on the shape.
_NAMES = ("conv3x3", "square1x1-odd", "depthwise3x3", "linear", "grouped3x3")
FEW = tuple(case for case in CASES if case.name in _NAMES)
FEW_ELIGIBLE = [(case, algorithm) for case in FEW for algorithm in ("auto", *case.algorithms)]


@dataclass
class Layer:
    case: Case
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"bias": self.bias, "z_is_output": True, **self.case.arguments}

    def update(self, lr: float | Tensor = 0.01, algorithm: str = "auto", **more: Any) -> None:
        hebbian_update_(self.weight, self.x, self.z, lr, algorithm=algorithm, **self.arguments, **more)

    def correlation(self, algorithm: str = "auto") -> Tensor:
        return correlation(self.x, self.z, self.weight, algorithm=algorithm, **self.arguments)


def layer(case: Case, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = DEVICE) -> Layer:
    """Operands of ``dtype``, parameters in fp32."""
    x, weight, bias = case.sample(torch.float64, device)
    z = case.forward(x, weight, bias).to(dtype)
    bias = None if bias is None else bias.float()
    return Layer(case, with_layout(x.to(dtype), layout, case), with_layout(z, layout, case), weight.float(), bias)
