"""Peak extra memory of each algorithm on a CPU: what CONTRIBUTING.md promises, by PyTorch's own count of its allocations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, with_layout
from torch import Tensor

from localsgd_ext import ops

pytestmark = pytest.mark.skipif(
    not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is measured here"
)

PARTS = 1 << 20  # elements that all the parts of a sum have at most, unless one has more
SMALL = 4096  # bytes: sums, scalars, alignment

LAYERS = (
    Case("square", (4, 256, 14, 14), (256, 256, 1, 1)),
    Case("expanding", (4, 64, 28, 28), (256, 64, 1, 1), bias=True),
    Case("expanding stride 2", (4, 64, 28, 28), (256, 64, 1, 1), stride=2),
    Case("contracting", (4, 256, 28, 28), (64, 256, 1, 1)),
    Case("grouped 1x1", (4, 128, 14, 14), (256, 32, 1, 1), groups=4),
    Case("linear", (300, 256), (512, 256), bias=True),
    Case("dense", (4, 64, 28, 28), (64, 64, 3, 3), padding=1),
    Case("stem", (4, 3, 64, 64), (32, 3, 7, 7), stride=2, padding=3),
    Case("depthwise", (4, 96, 28, 28), (96, 1, 3, 3), padding=1, groups=96),
)


def peak(function: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator holds at most during a call, beyond what it held before."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_the_count_is_right() -> None:
    def function() -> None:
        a = torch.empty(1 << 18)
        b = a + a
        del a
        b + 1

    assert peak(function) == pytest.approx(2 * 4 * (1 << 18), abs=SMALL)


def operands(case: Case, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, weight, bias = case.sample()
    z = case.forward(x, weight, bias)
    return with_layout(x.to(dtype), layout, case), with_layout(z.to(dtype), layout, case), weight, bias


def allowed(case: Case, algorithm: str, layout: str, dtype: torch.dtype) -> int:
    """The table in CONTRIBUTING.md, in bytes."""
    groups, taps = case.groups, torch.Size(case.weight[2:]).numel()
    d, in_features = torch.Size(case.weight).numel(), case.weight[1] * groups
    if algorithm == "gram":
        gram = groups * case.weight[1] ** 2
        rounded = d + d // 2 if dtype != torch.float32 else 0  # W as the forward saw it
        elements = (8 if case.weight[1] < 256 else 1) * (gram + in_features) + d + rounded
    elif algorithm == "direct":
        panels = case.weight[0] * -(-case.weight[1] * taps // 32) * 32
        images = case.dims > 0 and layout == "contiguous"  # a product for each, unless they are small
        in_place = case.pointwise and case.stride == 1 and dtype == torch.float32 and (not images or case.x[2] >= 16)
        elements = d if in_place else d + max(panels, min(8 * panels, PARTS) if case.weight[1] * taps < 256 else 0)
    else:
        assert algorithm == "depthwise"
        assert layout == "contiguous"
        elements = d
    return 4 * elements + SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_peak_memory(case: Case, layout: str, dtype: torch.dtype) -> None:
    x, z, weight, bias = operands(case, layout, dtype)
    for algorithm in case.algorithms:
        if algorithm == "library" or (algorithm == "depthwise" and layout != "contiguous"):
            continue  # what the library takes is its own affair; partial sums of channels_last: below
        kwargs = {"bias": bias, "algorithm": algorithm, "z_is_output": True, **case.arguments}
        used = peak(lambda kwargs=kwargs: ops.correlation(x, z, weight, **kwargs))
        assert used <= allowed(case, algorithm, layout, dtype), algorithm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [c for c in LAYERS if c.pointwise], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gram_copies_neither_x_nor_a_part_of_it(case: Case, layout: str, dtype: torch.dtype) -> None:
    x, z, weight, bias = operands(case, layout, dtype)
    used = peak(lambda: ops.correlation(x, z, weight, bias=bias, algorithm="gram", **case.arguments))
    gram, d = case.groups * case.weight[1] ** 2, weight.numel()
    parts = 1 if case.weight[1] >= 64 else 8
    assert used <= 4 * (parts * gram + d + (d + d // 2 if dtype != torch.float32 else 0)) + SMALL


def test_depthwise_partial_sums_of_channels_last() -> None:
    case = next(c for c in LAYERS if c.depthwise)
    x, z, weight, _ = operands(case, "channels_last", torch.float32)
    used = peak(lambda: ops.correlation(x, z, weight, algorithm="depthwise", **case.arguments))
    assert used <= 4 * weight.numel() + x.numel() * x.element_size() + SMALL


def test_the_update_needs_no_more_than_its_correlation() -> None:
    case = LAYERS[1]
    x, z, weight, bias = operands(case, "contiguous", torch.float32)
    kwargs = {"bias": bias, "algorithm": "gram", "z_is_output": True}
    alone = peak(lambda: ops.correlation(x, z, weight, **kwargs))
    assert peak(lambda: ops.hebbian_update_(weight, x, z, 1e-6, **kwargs)) <= alone + SMALL


@pytest.mark.parametrize("case", [c for c in LAYERS if c.dims], ids=str)
def test_a_channels_last_weight_needs_no_second_d(case: Case) -> None:
    x, z, weight, bias = operands(case, "contiguous", torch.float32)

    def used(weight: Tensor) -> int:
        return peak(lambda: ops.hebbian_update_(weight, x, z, 0.01, bias=bias, **case.arguments))

    assert used(weight.clone(memory_format=torch.channels_last)) <= used(weight.clone())


def test_few_rows_need_no_d() -> None:
    x, weight = torch.randn(16, 512), torch.randn(1024, 512)
    z = x @ weight.T
    assert peak(lambda: ops.hebbian_update_(weight, x, z, 1e-6)) <= weight.numel()  # a quarter of D's bytes
