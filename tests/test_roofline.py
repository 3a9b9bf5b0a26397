"""Costs against numbers worked out by hand."""

from __future__ import annotations

import doctest
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from localsgd_ext import roofline
from localsgd_ext.roofline import DEVICES, Cost, Device, Geometry, Product, cost, device, estimate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

EXPAND = Geometry(x=(2, 4, 5, 5), z=(2, 8, 5, 5), weight=(8, 4, 1, 1))  # 50 positions, 200 of x, 400 of z, 32 weights
DENSE = Geometry(x=(2, 3, 6, 6), z=(2, 5, 6, 6), weight=(5, 3, 3, 3))  # 72 positions, 216 of x, 360 of z, 135 weights
DEPTHWISE = Geometry(x=(1, 6, 8, 8), z=(1, 6, 4, 4), weight=(6, 1, 3, 3), groups=6)  # stride 2: 16 positions
LINEAR = Geometry(x=(7, 3, 4), z=(7, 3, 10), weight=(10, 4))  # 21 rows


def test_gram_reads_x_once_and_does_half_the_flops() -> None:
    # The triangle is 50 * 4 * 5 = 1000 flops, W·G 2 * 32 * 4 = 256. G's partial has 10 elements, D's 32.
    assert cost("gram", EXPAND) == Cost(200 * 4 + 2 * 32 * 4, 1000, "fp32", 4 * (10 + 32) * 4, Product(256, "fp32", 1))
    # On matrix units W·G is a product of parts: two where autocast made W and z bf16.
    assert cost("gram", EXPAND, x=BF16) == Cost(200 * 2 + 256, 1000, "bf16", 672, Product(256, "bf16", 2))
    assert cost("gram", LINEAR).flops == 21 * 4 * 5
    assert cost("gram", LINEAR).executed_flops(DEVICES["H200"]) == 21 * 4 * 5 + 2 * 40 * 4
    grouped = Geometry(x=(1, 8, 3, 3), z=(1, 4, 3, 3), weight=(4, 4, 1, 1), groups=2)
    assert cost("gram", grouped).flops == 2 * (9 * 4 * 5)
    assert cost("gram", grouped).product == Product(2 * 2 * 2 * 4 * 4, "fp32", 1)  # two groups of 2x4 weights, each times 4x4


@pytest.mark.parametrize(
    ("x", "z", "weight", "tf32", "unit", "product", "pairs"),
    [
        (BF16, BF16, FP32, False, "bf16", "bf16", 2),  # autocast
        (FP32, BF16, FP32, False, "bf16", "bf16", 2),  # its first layer, whose x it rounded
        (FP32, BF16, FP32, True, "bf16", "bf16", 2),
        (BF16, FP32, FP32, False, "bf16", "bf16", 7),  # W as it is
        (BF16, FP32, BF16, False, "bf16", "bf16", 3),
        (BF16, FP16, FP32, False, "bf16", "bf16", 7),
        (FP16, FP16, FP32, False, "fp16", "tf32", 2),
        (FP32, FP16, FP32, False, "fp16", "tf32", 2),
        (FP16, FP32, FP32, False, "fp16", "tf32", 3),
        (FP16, FP32, BF16, True, "fp16", "tf32", 2),
        (FP32, FP32, FP32, True, "tf32", "tf32", 2),
        (FP32, FP32, FP32, False, "fp32", "fp32", 1),
    ],
)
def test_the_gram_forms_product_keeps_fp32s_precision(
    x: torch.dtype, z: torch.dtype, weight: torch.dtype, tf32: bool, unit: str, product: str, pairs: int
) -> None:
    """In the order of parts.cuh; tests/emulated/test_roofline.py asks the kernels themselves."""
    counted = cost("gram", EXPAND, x=x, z=z, weight=weight, tf32=tf32)
    assert (counted.unit, counted.product) == (unit, Product(256, product, pairs))


def test_the_product_takes_its_own_time() -> None:
    toy = Device(
        "toy", (8, 0), 1, bytes_per_s=1e12, l2_bytes=0, flops_per_s={"fp32": 1e6, "fp16": 8e6, "tf32": 2e6}, launch_us=0
    )
    counted = cost("gram", EXPAND, x=FP16)
    assert counted.roofline_us(toy) == pytest.approx(1000 / 8 + 2 * 256 / 2)
    assert counted.executed_flops(toy) == 1000 + 2 * 256
    older = replace(toy, flops_per_s={"fp32": 1e6, "fp16": 8e6})  # sm_75: fp32 numbers, once
    assert counted.roofline_us(older) == pytest.approx(1000 / 8 + 256)
    assert counted.executed_flops(older) == 1000 + 256


def test_direct_reads_x_and_z_once() -> None:
    assert cost("direct", DENSE) == Cost((216 + 360) * 4 + 2 * 135 * 4, 2 * 72 * 5 * 27, "fp32", 4 * 135 * 4)
    assert cost("direct", DENSE, x=BF16, z=FP32).bytes == 216 * 2 + 360 * 4 + 1080
    assert cost("direct", DENSE, weight=BF16).bytes == (216 + 360) * 4 + 2 * 135 * 2


def test_depthwise_multiplies_in_fp32_whatever_the_dtypes() -> None:
    assert cost("depthwise", DEPTHWISE, x=BF16) == Cost((384 + 96) * 2 + 2 * 54 * 4, 2 * 16 * 54, "fp32", 4 * 54 * 4)


def test_library_writes_the_gradient_in_its_operands_dtype() -> None:
    assert cost("library", DENSE) == Cost((216 + 360 + 135) * 4, 2 * 72 * 135, "fp32")
    assert cost("library", DENSE, x=BF16).bytes == (216 + 360 + 135) * 2


def test_apply_reads_the_correlation_twice() -> None:
    assert cost("apply", DENSE) == Cost(4 * 135 * 4, 4 * 135, "fp32")
    assert cost("apply", DENSE, weight=BF16).bytes == 2 * 135 * 4 + 2 * 135 * 2


def test_workspace_of_split_sums_is_counted_apart() -> None:
    whole, split = cost("direct", DENSE), cost("direct", DENSE, splits=16)
    assert (whole.bytes, whole.flops) == (split.bytes, split.flops)
    assert split.workspace_bytes == 4 * 135 * (2 * 16 + 2)


def test_positions_that_a_stride_leaves_out_are_not_read() -> None:
    down = Geometry(x=(1, 4, 8, 8), z=(1, 8, 4, 4), weight=(8, 4, 1, 1))  # stride 2: 4 of 8 rows and columns
    assert down.x_elements("channels_last") == 4 * 4 * 4
    assert down.x_elements("contiguous") == 4 * 4 * 8  # whole rows
    assert DEPTHWISE.x_elements() == 384  # 3x3 at stride 2 reads everything
    assert DENSE.x_elements("contiguous") == 216
    assert cost("gram", down, layout="contiguous").bytes - cost("gram", down).bytes == 4 * 64


@pytest.mark.parametrize(
    ("x", "z", "tf32", "unit"),
    [
        (FP32, FP32, False, "fp32"),
        (FP32, FP32, True, "tf32"),
        (BF16, BF16, False, "bf16"),
        (FP32, BF16, False, "bf16"),
        (BF16, FP32, False, "fp32"),  # z would be rounded
        (BF16, FP32, True, "tf32"),
        (torch.float16, torch.float16, True, "fp16"),
        (torch.float16, BF16, False, "tf32"),
    ],
)
def test_operands_choose_the_unit(x: torch.dtype, z: torch.dtype, tf32: bool, unit: str) -> None:
    assert cost("direct", DENSE, x=x, z=z, tf32=tf32).unit == unit


def test_the_longer_of_memory_and_arithmetic_decides() -> None:
    toy = Device("toy", (8, 0), 1, bytes_per_s=1e6, l2_bytes=0, flops_per_s={"fp32": 2e6, "bf16": 8e6}, launch_us=5)
    assert Cost(100, 100, "fp32").roofline_us(toy) == pytest.approx(100 + 5)
    assert Cost(100, 400, "fp32").roofline_us(toy) == pytest.approx(200 + 5)
    assert Cost(100, 1600, "bf16").roofline_us(toy, launch_us=1) == pytest.approx(200 + 1)
    assert Cost(0, 200, "fp16").roofline_us(toy, launch_us=0) == pytest.approx(100)  # no such unit: widened to fp32
    assert toy.measured(2).launch_us == 2
    with pytest.raises(ValueError, match="unit must be one of"):
        toy.peak("int8")


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB SXM"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("A100-PCIE-40GB", "A100 40GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce GTX 1080 Ti", "GTX 1080 Ti"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("h200", "H200"),
    ],
)
def test_devices_are_known_by_the_drivers_name(driver: str, name: str) -> None:
    assert device(driver) is DEVICES[name]


@pytest.mark.parametrize("name", ["NVIDIA L40", "GeForce RTX 3090 Ti", "H100 NVL", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"device must be one of GTX 1080 Ti, .*, got "):
        device(name)


def test_unknown_properties_give_an_estimate() -> None:
    properties = SimpleNamespace(
        name="NVIDIA L40", major=8, minor=9, multi_processor_count=142, L2_cache_size=96 << 20, clock_rate=2_490_000,
        memory_clock_rate=9_001_000, memory_bus_width=384,
    )  # fmt: skip
    guess = device(properties)
    assert guess == estimate(properties)
    assert guess.name == "NVIDIA L40 (estimated)"
    assert guess.flops_per_s == {"fp32": pytest.approx(142 * 128 * 2 * 2.49e9)}
    assert guess.bytes_per_s == pytest.approx(864.1e9, rel=1e-3)
    properties.clock_rate = 0
    with pytest.raises(ValueError, match="NVIDIA L40' is unknown and this PyTorch does not tell them"):
        device(properties)


def test_clocks_of_known_devices_estimate_their_data_sheet() -> None:
    properties = SimpleNamespace(
        name="?", major=6, minor=1, multi_processor_count=28, L2_cache_size=0, clock_rate=1_582_000,
        memory_clock_rate=5_505_000, memory_bus_width=352,
    )  # fmt: skip
    guess, sheet = estimate(properties), DEVICES["GTX 1080 Ti"]
    assert guess.peak("fp32") == pytest.approx(sheet.peak("fp32"), rel=0.01)
    assert guess.bytes_per_s == pytest.approx(sheet.bytes_per_s, rel=0.01)


def test_winograd_multiplies_in_tiles() -> None:
    assert cost("winograd", DENSE).flops * 9 / 4 == cost("direct", DENSE).flops  # 2 x 2, without a rest
    long = Geometry(x=(32, 3, 16, 16), z=(32, 5, 16, 16), weight=(5, 3, 3, 3))
    assert cost("winograd", long).flops * 4 == cost("direct", long).flops  # 4 x 4
    short = Geometry(x=(2, 3, 16, 18), z=(2, 5, 16, 18), weight=(5, 3, 3, 3))
    assert cost("winograd", short).flops == 2 * 24 * 2 * 8 * 5 * 15  # 2 x 4
    assert cost("winograd", DENSE, x=BF16).bytes == cost("direct", DENSE, x=BF16).bytes
    assert cost("winograd", DENSE, x=BF16).unit == "fp32"
    odd = Geometry(x=(1, 3, 5, 3), z=(1, 5, 5, 3), weight=(5, 3, 3, 3))
    assert cost("winograd", odd).flops == 2 * 16 * 3 * 2 * 15
    with pytest.raises(ValueError, match="needs a 3x3 kernel"):
        cost("winograd", EXPAND)


def test_errors_say_what_came() -> None:
    with pytest.raises(
        ValueError, match="algorithm must be one of gram, direct, depthwise, winograd, library, apply, got 'auto'"
    ):
        cost("auto", DENSE)
    with pytest.raises(ValueError, match=r"needs a kernel of size 1 .*\(5, 3, 3, 3\)"):
        cost("gram", DENSE)
    with pytest.raises(ValueError, match="needs groups == in_channels > 1"):
        cost("depthwise", DENSE)
    with pytest.raises(ValueError, match="layout must be one of"):
        cost("direct", DENSE, layout="nhwc")
    with pytest.raises(ValueError, match=r"x must have 6 channels"):
        Geometry(x=(1, 4, 5, 5), z=(1, 2, 5, 5), weight=(2, 6, 1, 1))
    with pytest.raises(ValueError, match=r"z must have 2 channels"):
        Geometry(x=(1, 6, 5, 5), z=(1, 3, 5, 5), weight=(2, 6, 1, 1))
    with pytest.raises(ValueError, match=r"x and z must have 4 dimensions"):
        Geometry(x=(6, 5, 5), z=(2, 5, 5), weight=(2, 6, 1, 1))
    with pytest.raises(ValueError, match="weight must have 2"):
        Geometry(x=(6,), z=(2,), weight=(2,))


def test_the_example_in_the_documentation() -> None:
    assert doctest.testmod(roofline, extraglobs={"torch": torch}).failed == 0
