"""What is timed: the update with each algorithm, and what a user has without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, with_layout
from torch import Tensor

from benchmarks.networks import output_shape
from localsgd_ext import hebbian_update_

LR = 1e-6  # of no importance to the time, and W stays where it is
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nhwc": "channels_last", "nchw": "contiguous"}
BASELINES = {
    "wgrad": "(a) the library's weight gradient alone",
    "user": "(b) weight gradient, norm and add_",
    "compiled": "(c) the same under torch.compile",
    "unfold": "(d) unfold and GEMM, norm and add_",
}


@dataclass
class Operands:
    """``x`` and ``z`` as autocast would have them, parameters in fp32."""

    case: Case
    x: Tensor
    z: Tensor
    weight: Tensor
    bias: Tensor | None
    like: Tensor
    """The weight in ``x``'s dtype, which the library's weight gradient wants: the forward made it, so it is no part of the time."""

    @property
    def pads(self) -> list[int]:
        assert not isinstance(self.case.padding, str)  # no network here has 'same'
        return self._ints(self.case.padding)

    def _ints(self, value: int | tuple[int, ...]) -> list[int]:
        return [value] * self.case.dims if isinstance(value, int) else list(value)

    def update(self, algorithm: str) -> None:
        hebbian_update_(
            self.weight, self.x, self.z, LR, bias=self.bias, z_is_output=True, algorithm=algorithm, **self.case.arguments
        )

    def wgrad(self) -> Tensor:
        """In the operands' dtype, as back-propagation makes it."""
        case = self.case
        if case.dims == 0:
            return self.z.flatten(0, -2).t() @ self.x.flatten(0, -2)
        return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
            self.z, self.x, self.like, None, self._ints(case.stride), self.pads, self._ints(case.dilation), False, [0] * case.dims,
            case.groups, [False, True, False]
        )[1]  # fmt: skip

    def write(self, d: Tensor) -> None:
        """As a user would write it: no host synchronisation."""
        d = d.float()
        self.weight.add_(d * (LR / torch.linalg.vector_norm(d)))

    def user(self) -> None:
        self.write(self.wgrad())

    def unfold(self) -> None:
        """FastHebb (arXiv 2207.03172): the patch matrix in memory, then one GEMM a group."""
        case = self.case
        columns = F.unfold(self.x, case.weight[2:], case.dilation, tuple(self.pads), case.stride)  # [N, C * taps, positions]
        g = case.groups
        patches = columns.unflatten(1, (g, -1)).permute(1, 2, 0, 3).flatten(2)  # [groups, C/g * taps, N * positions]
        z = self.z.flatten(2).unflatten(1, (g, -1)).permute(1, 2, 0, 3).flatten(2)  # [groups, K/g, N * positions]
        self.write((z @ patches.transpose(1, 2)).reshape(case.weight))


def operands(case: Case, dtype: str, layout: str, device: str) -> Operands:
    """Normally distributed numbers, ``x`` shifted as after a ReLU, ``z`` the layer's own output."""
    generator = torch.Generator(device).manual_seed(0)
    kind = DTYPES[dtype]

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = with_layout(normal(case.x).add_(0.5).to(kind), LAYOUTS[layout], case)
    fan_in = max(1, torch.Size(case.weight[1:]).numel())
    weight = with_layout(normal(case.weight) * fan_in**-0.5, LAYOUTS[layout], case)
    bias = normal(case.weight[:1]) if case.bias else None
    with torch.no_grad():
        like = weight.to(kind, copy=True)
        z = case.forward(x, like, None if bias is None else bias.to(kind))
    assert tuple(z.shape) == output_shape(case)
    return Operands(case, x, with_layout(z, LAYOUTS[layout], case), weight, bias, like)


def reduced(case: Case, most_flops: float) -> Case:
    """The same layer on as much of the batch as makes a weight gradient of at most ``most_flops``."""
    each = 2 * torch.Size(output_shape(case)).numel() // case.x[0] * torch.Size(case.weight[1:]).numel()
    return replace(case, x=(max(1, min(case.x[0], int(most_flops / max(1, each)))), *case.x[1:]))


def compiled_user(o: Operands) -> Callable[[], object] | None:
    """None where PyTorch cannot compile it (no C++ compiler, no Triton)."""
    torch.compiler.reset()  # every layer is a function of its own, not one more recompilation
    function: Callable[[], object] = torch.compile(o.user, dynamic=False)
    try:
        function()
    except Exception as error:  # whatever the compiler stack raises
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return function


def algorithms(case: Case, device: str | torch.device) -> tuple[str, ...]:
    """That the layer is eligible for there."""
    return case.cpu_algorithms if torch.device(device).type == "cpu" else case.algorithms


def functions(o: Operands, *, compiled: bool, unfold: bool) -> dict[str, Callable[[], object]]:
    """Every function to time by name: ``auto``, the eligible algorithms, the baselines."""
    timed: dict[str, Callable[[], object]] = {}
    for algorithm in ("auto", *algorithms(o.case, o.x.device)):
        timed[algorithm] = partial(o.update, algorithm)
    timed["wgrad"] = o.wgrad
    timed["user"] = o.user
    if compiled and (function := compiled_user(o)):
        timed["compiled"] = function
    if unfold and o.case.dims == 2:
        timed["unfold"] = o.unfold
    return timed
