"""Whether an update is right: against fp64, by the error of PyTorch's own operation in the same dtypes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import Case
from oracle import FP64, exact, relative_error
from torch import Tensor

from localsgd_ext import hebbian_update_, ops
from localsgd_ext._precision import tf32_allowed

# What two errors must exceed before one can be called worse than the other: 4 ulp of the accumulator, 16 in fp64 (the
# oracle's own rounding is part of the difference); one ulp of tf32, which cuDNN is free not to round to.
FLOORS = {"fp64": 16 * torch.finfo(FP64).eps, "fp32": 4 * torch.finfo(torch.float32).eps, "tf32": 2.0**-10}


@dataclass(frozen=True)
class Parity:
    error: float
    theirs: float
    """The error of PyTorch's own operation."""
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def pytorchs_own(case: Case, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight gradient for ``z``, or for the layer's own output, as autograd makes it in ``dtype``."""
    narrow = weight.detach().to(dtype).requires_grad_()
    output = case.forward(x.to(dtype), narrow, None if bias is None else bias.to(dtype))
    return torch.autograd.grad(output, narrow, output.detach() if z is None else z.to(dtype))[0]


def as_forward_saw(parameter: Tensor | None, z: Tensor) -> Tensor | None:
    """Rounded to ``z``'s dtype where that is lower."""
    return parameter if parameter is None or z.dtype.itemsize >= parameter.dtype.itemsize else parameter.to(z.dtype)


class Judge:
    """Judges correlations of one layer call; ``gram`` answers to another truth than those that read ``z``."""

    def __init__(self, case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.case, self.x, self.z, self.weight, self.bias = case, x, z, weight, bias
        self._known: dict[tuple[bool, bool], tuple[Tensor, float]] = {}

    def _truth(self, gram: bool, promised: bool) -> tuple[Tensor, float]:
        """fp64, and the error of PyTorch's own operation. ``promised``: ``z`` is the layer's output, so that where it is of lower
        precision than ``x``, autocast rounded ``x`` for the forward, and does for the weight gradient."""
        if (gram, promised) not in self._known:
            z = None if gram else self.z
            weight = as_forward_saw(self.weight, self.z) if gram else self.weight
            bias = as_forward_saw(self.bias, self.z) if gram else self.bias
            assert weight is not None
            with torch.no_grad():
                truth = exact(self.case, self.x, z, weight, bias)
            rounded = promised and self.z.dtype.itemsize < self.x.dtype.itemsize
            common = self.z.dtype if rounded else torch.promote_types(self.x.dtype, self.z.dtype)
            theirs = self._their_error(z, weight, bias, common, truth)
            self._known[gram, promised] = truth, theirs
        return self._known[gram, promised]

    def _their_error(self, z: Tensor | None, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, truth: Tensor) -> float:
        """In fp32 where they have no result in ``dtype``: fp16 that overflowed, a convolution that cuDNN lacks."""
        try:
            error = relative_error(pytorchs_own(self.case, self.x, z, weight, bias, dtype), truth)
            if error < 1 or dtype in (torch.float32, FP64):
                return error
        except RuntimeError:
            if dtype in (torch.float32, FP64):
                raise
        return self._their_error(z, weight, bias, torch.float32, truth)

    def judge(self, d: Tensor, algorithm: str, *, direction: bool = False) -> Parity:
        """``direction``: only that of ``d`` is known, as of an update, to which ``z`` was promised to be the layer's output."""
        truth, theirs = self._truth(algorithm == "gram", promised=direction)
        error = relative_error(d, truth / truth.norm() if direction else truth)
        tf32 = tf32_allowed(linear=self.case.dims == 0) and {self.x.dtype, self.z.dtype} == {torch.float32}
        floor = FLOORS["fp64" if d.dtype == FP64 and not direction else "tf32" if tf32 else "fp32"]
        return Parity(error, theirs, max(2 * theirs, floor))

    def correlation(self, algorithm: str) -> Parity:
        d = ops.correlation(self.x, self.z, self.weight, bias=self.bias, algorithm=algorithm, **self.case.arguments)
        return self.judge(d, algorithm)

    def update(self, algorithm: str) -> Parity:
        """The fp32 weight's change by a step as long as the weight itself."""
        before = self.weight.detach().clone()
        weight = before.clone()
        length = before.double().norm()
        picked = self.pick() if algorithm == "auto" else algorithm
        hebbian_update_(
            weight, self.x, self.z, length, bias=self.bias, z_is_output=True, algorithm=algorithm, **self.case.arguments
        )
        return self.judge((weight.double() - before.double()) / length, picked, direction=True)

    def pick(self) -> str:
        """What ``auto`` takes for the layer's own output."""
        plan = self.plan()
        return "reference" if plan is None else str(plan.pick)

    def plan(self) -> Any:
        """Of ``auto``; None where the reference runs."""
        if ops.obstacle(self.weight, self.x, self.z):
            return None
        return ops.plan(self.x, self.z, self.weight, bias=self.bias, z_is_output=True, **self.case.arguments)
