"""Peak extra memory of each algorithm on a CPU: what CONTRIBUTING.md promises, by PyTorch's own count of its allocations."""

from __future__ import annotations

from collections.abc import Callable

import cpu_tasks
import pytest
import torch
from cases import Case, with_layout
from torch import Tensor

from localsgd_ext import ops

pytestmark = pytest.mark.skipif(
    not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is measured here"
)

SMALL = 4096  # bytes: sums, scalars, alignment

LAYERS = (
    Case("square", (4, 256, 14, 14), (256, 256, 1, 1)),
    Case("expanding", (4, 64, 28, 28), (256, 64, 1, 1), bias=True),
    Case("expanding stride 2", (4, 64, 28, 28), (256, 64, 1, 1), stride=2),
    Case("contracting", (4, 256, 28, 28), (64, 256, 1, 1)),
    Case("grouped 1x1", (4, 128, 14, 14), (256, 32, 1, 1), groups=4),
    Case("narrow", (4, 96, 40, 40), (64, 96, 1, 1), bias=True),
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


def allowed(case: Case, algorithm: str, x: Tensor, z: Tensor, weight: Tensor) -> int:
    """The table in CONTRIBUTING.md, in bytes, for operands of one dtype and fp32 sums."""
    d, positions, size = weight.numel(), z.numel() // case.weight[0], x.element_size()
    images_apart = case.dims > 0 and x.stride(1) != 1 and case.x[0] > 1
    if algorithm == "gram":
        gram_and_sums = case.groups * case.weight[1] * (case.weight[1] + case.bias)
        rows_of_d = min(256, case.weight[0] // case.groups) * -(-case.weight[1] // 32) * 32
        elements = cpu_tasks.parts(case, algorithm, positions) * gram_and_sums + d + rows_of_d
        elements += d if z.dtype != weight.dtype else 0
    elif algorithm == "direct":
        matrices = case.pointwise and case.stride == 1 and z.dtype == weight.dtype
        if matrices and not (images_apart and positions // case.x[0] < 256):
            parts = max(1, min(8, positions // 8192, (1 << 20) // d))
            elements = d + (parts * d if parts > 1 else 0)
        elif cpu_tasks.has_few_channels(case, x, z):
            elements = d + 2 * d * cpu_tasks.few_channels_parts(case, z)
        else:
            elements = d + cpu_tasks.parts(case, algorithm, positions) * cpu_tasks.panels(case)
    elif algorithm == "winograd":
        plan = cpu_tasks.winograd_plan(case, positions, torch.get_num_threads())
        elements = d + plan["parts"] * plan["sums"] + plan["blocks"] * plan["block"]
    elif algorithm == "depthwise":
        elements = d if images_apart else d + 64 * 2 * d
    elif case.dims == 0:
        elements = 2 * d
    else:
        bf16 = x.dtype == torch.bfloat16
        blocked = (in_blocks(x) + in_blocks(z)) * size // 4
        patches = d // case.weight[0] * case.groups * positions * size // 4
        elements = 2 * d + blocked if not bf16 else 3 * d + max(2 * blocked, 0 if multiplies_bf16() else patches)
    return 4 * elements + SMALL


def in_blocks(tensor: Tensor) -> int:
    """Elements in oneDNN's blocks of 16 channels."""
    return tensor.numel() // tensor.shape[1] * -(-tensor.shape[1] // 16) * 16


def multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_peak_memory(case: Case, layout: str, dtype: torch.dtype) -> None:
    x, z, weight, bias = operands(case, layout, dtype)
    for algorithm in case.cpu_algorithms:
        kwargs = {"bias": bias, "algorithm": algorithm, "z_is_output": True, **case.arguments}
        used = peak(lambda kwargs=kwargs: ops.correlation(x, z, weight, **kwargs))
        assert used <= allowed(case, algorithm, x, z, weight), algorithm


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_peak_memory_of_winograd_with_several_parts(threads: int) -> None:
    case = Case("", (6, 40, 40, 40), (70, 40, 3, 3), padding=1)
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16):
        x, z, weight, _ = operands(case, "contiguous", dtype)
        plan = cpu_tasks.winograd_plan(case, z.numel() // 70, threads)
        assert plan["parts"] > 1
        used = peak(lambda x=x, z=z, weight=weight: ops.correlation(x, z, weight, algorithm="winograd", padding=1))
        assert 0.9 * allowed(case, "winograd", x, z, weight) < used <= allowed(case, "winograd", x, z, weight)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_library_also_copies_operands_of_another_dtype(case: Case) -> None:
    x, z, weight, _ = operands(case, "contiguous", torch.float32)
    used = peak(lambda: ops.correlation(x.bfloat16(), z, weight, algorithm="library", **case.arguments))
    assert used <= allowed(case, "library", x, z, weight) + (4 + 2) * x.numel()  # and the call's own x.bfloat16()


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
