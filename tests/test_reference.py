"""The reference against autograd, against loops written out, and against itself (Gram identity)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES, EMPTY_CASES, Case
from torch import Tensor

from localsgd_ext import reference

FP64 = torch.float64

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def padded(case: Case, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input with its padding written out, by a route of its own: index arithmetic instead of F.pad."""
    dims = case.dims
    dilation = [case.dilation] * dims if isinstance(case.dilation, int) else list(case.dilation)
    for i in range(dims):
        if case.padding == "same":
            total = dilation[i] * (case.weight[2 + i] - 1)
            before, after = total // 2, total - total // 2
        elif case.padding == "valid":
            before = after = 0
        else:
            before = after = case.padding if isinstance(case.padding, int) else case.padding[i]
        axis, size = x.dim() - dims + i, x.shape[x.dim() - dims + i]
        position = torch.arange(-before, size + after)
        if case.padding_mode == "circular":
            source = position % size
        elif case.padding_mode == "replicate":
            source = position.clamp(0, size - 1)
        else:
            source = (
                (size - 1 - (size - 1 - position.abs()).abs())
                if case.padding_mode == "reflect"
                else position.clamp(0, size - 1)
            )
        x = x.index_select(axis, source)
        if case.padding_mode == "zeros":
            inside = ((position >= 0) & (position < size)).view([-1] + [1] * (dims - 1 - i))
            x = x * inside
    return x, dilation


def loops(case: Case, x: Tensor, z: Tensor) -> Tensor:
    """Equation 3 with the sum over filter taps and positions written out."""
    if case.dims == 0:
        return torch.einsum("...k,...c->kc", z, x)
    x, dilation = padded(case, x)
    if not case.batched:
        x, z = x.unsqueeze(0), z.unsqueeze(0)
    stride = [case.stride] * case.dims if isinstance(case.stride, int) else list(case.stride)
    outputs, d = case.weight[0], torch.zeros(case.weight, dtype=FP64)
    for k, c in itertools.product(range(outputs), range(case.weight[1])):
        channel = k // (outputs // case.groups) * case.weight[1] + c
        for tap in itertools.product(*(range(n) for n in case.weight[2:])):
            total = 0.0
            for p in itertools.product(*(range(n) for n in z.shape[2:])):
                at = [p[i] * stride[i] + tap[i] * dilation[i] for i in range(case.dims)]
                total += (z[(slice(None), k, *p)] * x[(slice(None), channel, *at)]).sum().item()
            d[(k, c, *tap)] = total
    return d


TINY = (
    Case("conv2d", (2, 4, 5, 6), (4, 2, 3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
    Case("conv2d-same", (1, 2, 4, 5), (2, 2, 2, 4), padding="same"),
    Case("conv2d-reflect", (1, 2, 4, 5), (2, 2, 3, 3), padding=2, padding_mode="reflect"),
    Case("conv2d-replicate", (1, 2, 4, 5), (2, 2, 3, 3), padding=(0, 2), padding_mode="replicate"),
    Case("conv2d-circular", (1, 2, 4, 5), (2, 2, 3, 3), padding=1, padding_mode="circular"),
    Case("depthwise", (2, 3, 5, 4), (6, 1, 3, 3), padding=1, groups=3),
    Case("conv1d", (2, 3, 9), (2, 3, 3), stride=2, dilation=2, padding=1),
    Case("conv3d", (1, 2, 3, 4, 3), (2, 2, 2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)),
    Case("1x1", (2, 3, 4, 5), (4, 3, 1, 1), stride=2, padding=1),
    Case("unbatched", (3, 4, 5), (4, 3, 3, 3)),
    Case("linear", (2, 3, 4), (5, 4)),
)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_is_the_sum_of_equation_3(case: Case) -> None:
    x, weight, _ = case.sample(FP64)
    z = torch.randn_like(case.forward(x, weight, None))
    d = reference.correlation(x, z, weight, **case.arguments)
    torch.testing.assert_close(d, loops(case, x, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_autograds_weight_gradient_with_z_for_the_outputs_gradient(case: Case) -> None:
    x, weight, bias = case.sample(FP64)
    weight.requires_grad_()
    output = case.forward(x, weight, bias)
    (gradient,) = torch.autograd.grad(output, weight, grad_outputs=output.detach())
    d = reference.correlation(x, output.detach(), weight, bias=bias, **case.arguments)
    torch.testing.assert_close(d, gradient, rtol=1e-11, atol=1e-11)
    implied = reference.correlation(x, None, weight, bias=bias, **case.arguments)
    torch.testing.assert_close(implied, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [c for c in CASES if c.pointwise], ids=str)
def test_gram_form_is_exact(case: Case) -> None:
    x, weight, bias = case.sample(FP64)
    z = case.forward(x, weight, bias)
    direct = reference.correlation(x, z, weight, bias=bias, **case.arguments)
    gram = reference.correlation(x, z, weight, bias=bias, algorithm="gram", **case.arguments)
    torch.testing.assert_close(gram, direct, rtol=1e-11, atol=1e-11)


def test_gram_uses_the_weight_as_the_forward_rounded_it() -> None:
    case = Case("1x1", (2, 24, 9, 9), (16, 24, 1, 1), bias=True)
    x, weight, bias = case.sample()
    z = case.forward(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    d = reference.correlation(x, z, weight, bias=bias, algorithm="gram")
    rounded = reference.correlation(x, None, weight.bfloat16().float(), bias=bias.bfloat16().float(), algorithm="gram")
    exact = reference.correlation(x, None, weight, bias=bias, algorithm="gram")
    assert torch.equal(d, rounded)
    assert not torch.allclose(d, exact, rtol=1e-4)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty_batch_has_no_correlation(case: Case) -> None:
    x, weight, bias = case.sample()
    d = reference.correlation(x, case.forward(x, weight, bias), weight, bias=bias, **case.arguments)
    assert d.shape == weight.shape
    assert d.dtype == torch.float32
    assert not d.any()


def test_update_is_a_step_of_length_lr_along_d() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    d = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    reference.apply_update_([weight], [d], 0.5)
    torch.testing.assert_close(weight, torch.tensor([[3.0, 0.3], [0.4, 1.0]]))
    reference.apply_update_([weight], [d], torch.tensor(-1.0), normalize=False)
    torch.testing.assert_close(weight, torch.tensor([[3.0, -2.7], [-3.6, 1.0]]))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_unusable_norm_leaves_the_weight(value: float) -> None:
    weights = [torch.randn(3, 4), torch.randn(5)]
    before = [w.clone() for w in weights]
    bad = torch.zeros(3, 4)
    bad[1, 2] = value
    skipped = torch.zeros(2, dtype=torch.int64)
    reference.apply_update_(weights, [bad, torch.ones(5)], 0.1, skipped=skipped)
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])
    assert skipped.tolist() == [1, 0]
