"""What lies between the operations and the CUDA kernels: dispatch, configurations, rates on the device, the write of many."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from cases import Case, with_layout
from torch import Tensor

import localsgd_ext
from emulated import gpu
from localsgd_ext import explain, ops, reference, roofline

LAYERS = {
    "gram": Case("", (2, 16, 9, 7), (24, 16, 1, 1), bias=True),
    "direct": Case("", (2, 16, 9, 7), (24, 16, 3, 3), padding=1, bias=True),
    "depthwise": Case("", (2, 40, 9, 7), (40, 1, 3, 3), padding=1, groups=40),
    "library": Case("", (2, 16, 9, 7), (24, 16, 3, 3), padding=1),
}


@pytest.fixture(autouse=True)
def _same_gpu() -> Iterator[None]:
    gpu.emulate()
    yield
    gpu.emulate()


def layer(algorithm: str, dtype: torch.dtype = torch.float32) -> tuple[Case, Tensor, Tensor, Tensor, Tensor | None]:
    case = LAYERS[algorithm]
    x, weight, bias = case.sample()
    return case, x.to(dtype), case.forward(x, weight, bias).to(dtype), weight, bias


def updated(algorithm: str, lr: float | Tensor = -0.25, **more: object) -> Tensor:
    case, x, z, weight, bias = layer(algorithm)
    ops.hebbian_update_(weight, x, z, lr, bias=bias, algorithm=algorithm, **more, **case.arguments)
    return weight


@pytest.mark.parametrize("algorithm", ["gram", "direct", "depthwise"])
def test_same_bits_in_any_order_of_execution_and_with_a_launch_a_phase(algorithm: str) -> None:
    gpu.emulate(seed=1)
    first = updated(algorithm)
    for seed in range(2, 8):
        gpu.emulate(seed=seed)
        assert torch.equal(updated(algorithm), first)
    gpu.emulate(seed=9, cooperative=False)
    assert torch.equal(updated(algorithm), first)


@pytest.mark.parametrize("algorithm", list(LAYERS))
def test_a_rate_on_the_device_is_read_at_each_update(algorithm: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        lr = torch.tensor(-0.25, dtype=dtype)
        assert torch.equal(updated(algorithm, lr), updated(algorithm, -0.25))
        lr.fill_(0.5)
        assert torch.equal(updated(algorithm, lr), updated(algorithm, 0.5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("implementation", [ops, reference])
@pytest.mark.parametrize("algorithm", list(LAYERS))
def test_a_rate_on_the_device_that_is_not_finite_moves_nothing(algorithm: str, implementation, value: float) -> None:
    case, x, z, weight, bias = layer(algorithm)
    before, skipped = weight.clone(), torch.zeros((), dtype=torch.int64)
    implementation.hebbian_update_(
        weight, x, z, torch.tensor(value), bias=bias, algorithm=algorithm, skipped=skipped, **case.arguments
    )
    assert torch.equal(weight, before)
    assert skipped.item() == 1


def test_more_tensors_than_one_launch_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5)] * 150 + [(70, 90, 1, 1), (4, 6, 3, 3), (0,), (9001,)]
    ds = [torch.randn(shape, generator=generator) for shape in shapes]
    ds[120][1, 1] = float("nan")
    weights = [torch.zeros(shape) for shape in shapes]
    weights[151] = weights[151].to(memory_format=torch.channels_last)
    weights[7] = torch.zeros(3, 10)[:, ::2]
    skipped = torch.zeros(2 * len(shapes), dtype=torch.int64)[::2]
    ops.apply_update_(weights, ds, 0.5, skipped=skipped)
    assert skipped.nonzero().flatten().tolist() == [120, 152]
    for i, (weight, d) in enumerate(zip(weights, ds, strict=True)):
        torch.testing.assert_close(weight, torch.zeros_like(d) if i in (120, 152) else 0.5 * d / d.norm())


def test_float64_runs_on_the_reference_and_that_is_said_once() -> None:
    _, x, z, weight, bias = layer("gram", torch.float64)
    ops._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            d = ops.correlation(x, z, weight, bias=bias, algorithm="gram")
            ops.apply_update_([weight], [d], 0.5)
    assert d.dtype == torch.float64
    assert ["the kernels do not take float64" in str(w.message) for w in caught] == [True]
    with pytest.raises(RuntimeError, match="the kernels do not take float64"):
        ops.plan(x, z, weight)
    assert not ops.obstacle(x.float(), weight)


@pytest.mark.parametrize(
    ("compute", "dtype", "tf32", "core"),
    [
        (61, torch.bfloat16, True, "ffma"),
        (75, torch.float16, True, "mma_f16"),
        (75, torch.bfloat16, True, "ffma"),
        (75, torch.float32, True, "ffma"),
        (80, torch.bfloat16, False, "mma_bf16"),
        (80, torch.float32, True, "mma_tf32"),
        (80, torch.float32, False, "ffma"),
        (90, torch.float16, False, "mma_f16"),
    ],
)
def test_the_core_follows_architecture_dtype_and_torchs_tf32_flags(
    compute: int, dtype: torch.dtype, tf32: bool, core: str
) -> None:
    gpu.emulate(compute=compute)
    torch.backends.cudnn.allow_tf32 = tf32  # convolutions
    case, x, z, weight, bias = layer("direct", dtype)
    assert configuration(x, z, weight, bias, "direct", **case.arguments).startswith(f"{core} ")
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = False, tf32  # linear layers
    x, weight = torch.randn(64, 32).to(dtype), torch.randn(48, 32)
    z = (x.float() @ weight.T).to(dtype)
    assert configuration(x, z, weight, None, "direct").startswith(f"{core} ")


def configuration(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str, **arguments: object) -> str:
    plan = ops.plan(x, z, weight, bias=bias, z_is_output=True, **arguments)  # type: ignore[arg-type]
    return next(c.configuration for c in plan.candidates if c.algorithm == algorithm)


def test_an_fp32_input_is_rounded_only_where_autocast_did_so_for_the_output() -> None:
    _, x, z, weight, _ = layer("direct")
    z = z.bfloat16()
    for is_output, core in ((True, "mma_bf16"), (False, "ffma")):
        plan = ops.plan(x, z, weight, padding=1, z_is_output=is_output)
        assert next(c.configuration for c in plan.candidates if c.algorithm == "direct").startswith(core)


def test_layouts_are_read_as_they_lie() -> None:
    case, x, z, weight, bias = layer("gram", torch.bfloat16)
    texts = [
        configuration(with_layout(x, layout, case), with_layout(z, layout, case), weight, bias, "direct")
        for layout in ("channels_last", "sliced")
    ]
    assert "x by 16 bytes" in texts[0]
    assert "x by scalar" in texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_channels_beside_an_output_in_channels_last_are_read_by_segments(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 3, 32, 32, dtype=dtype), torch.randn(64, 3, 3, 3)
    z = torch.randn(4, 64, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def access(x: Tensor, z: Tensor) -> str:
        return configuration(x, z, weight, None, "direct", padding=1).split(", ")[2]

    assert access(x, z) == access(x.contiguous(memory_format=torch.channels_last), z) == "x by segments"
    assert access(x.float(), z) == "x by segments of fp32"  # as autocast leaves a network's input
    assert access(x, z.contiguous()) == access(x[..., 1:], z[..., 1:]) == "x by scalar"  # z in NCHW; rows that begin anywhere


def test_too_many_positions_are_the_librarys() -> None:
    weight = torch.randn(4, 4)
    x, z = torch.randn(1).expand(2**31, 4), torch.randn(1).expand(2**31, 4)  # no memory behind it
    plan = ops.plan(x, z, weight, z_is_output=True)
    why = {c.algorithm: c.why_not for c in plan.candidates if not c.eligible}
    assert why["direct"] == why["gram"] == "cannot take more than 2^31 - 2^20 output positions"
    assert plan.pick == "library"
    before = weight.clone()
    with pytest.raises(ValueError, match=r"algorithm 'direct' cannot take more than 2\^31"):
        ops.hebbian_update_(weight, x, z, 0.1, algorithm="direct")
    assert torch.equal(weight, before)


def test_more_tiles_than_can_be_counted_are_the_librarys() -> None:
    groups = 2**19 + 1  # a tile each, mostly empty
    weight = torch.zeros(1).expand(2 * groups, 2, 1)
    x, z = torch.zeros(1).expand(1, 2 * groups, 1), torch.zeros(1).expand(1, 2 * groups, 1)
    plan = ops.plan(x, z, weight, groups=groups, z_is_output=True)
    why = {c.algorithm: c.why_not for c in plan.candidates if not c.eligible}
    assert why["direct"] == "cannot take a correlation of more than 2^33 elements in tiles"
    assert why["gram"] == "cannot take a Gram matrix of more than 2^33 elements in tiles"
    assert plan.pick == "library"
    groups = 2**18 + 1
    x, z = torch.zeros(1).expand(1, groups, 1), torch.zeros(1).expand(1, 129 * groups, 1)
    plan = ops.plan(x, z, torch.zeros(1).expand(129 * groups, 1, 1), groups=groups, z_is_output=True)
    why = {c.algorithm: c.why_not for c in plan.candidates if not c.eligible}
    assert why["direct"] == why["gram"] == "cannot take a correlation of more than 2^33 elements in tiles"


def test_benchmark_times_each_automatic_algorithm_once_and_leaves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localsgd_ext.ops, "benchmark", True)
    _, x, z, weight, bias = layer("gram")
    before = weight.clone()
    first, second = (ops.plan(x, z, weight, bias=bias, z_is_output=True) for _ in range(2))
    times = {c.algorithm: c.measured_us for c in first.candidates}
    assert times == {c.algorithm: c.measured_us for c in second.candidates}
    assert times["depthwise"] is None
    assert min(times[a] for a in ("gram", "direct", "library")) == times[first.pick]
    assert torch.equal(weight, before)


def test_the_library_is_not_picked_for_linear_layers_where_it_would_raise() -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    torch.use_deterministic_algorithms(True)
    try:
        plan = ops.plan(x, x @ weight.T, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    library = next(c for c in plan.candidates if c.algorithm == "library")
    assert library.eligible
    assert not library.automatic


def test_explain_names_core_tiles_and_launches() -> None:
    gpu.emulate(multiprocessors=132)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 64, 1))
    rows = list(explain(model, torch.randn(2, 3, 32, 32)))
    for row in rows:
        costs = {cost.algorithm: cost for cost in row.costs}
        assert "one launch" in costs["direct"].configuration
        assert costs["library"].configuration == "weight gradient, then apply"
        assert row.roofline_us is None  # the peaks of an emulated GPU are nothing to speak of
    assert "product" in {cost.algorithm: cost for cost in rows[1].costs}["gram"].configuration


def test_explain_shows_the_share_of_the_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(localsgd_ext.explain.__globals__, "_device_of", lambda _: roofline.DEVICES["H200"])
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 64, 1))
    table = explain(model, torch.randn(2, 3, 32, 32))
    for row in table:
        us = next(cost.estimated_us for cost in row.costs if cost.algorithm == row.pick)
        assert row.roofline_us is not None
        assert row.roofline_share == row.roofline_us / us
        assert f"{row.roofline_share:.0%}" in str(table)
    least = roofline.cost(table.layers[0].pick, roofline.Geometry((2, 3, 32, 32), (2, 16, 30, 30), (16, 3, 3, 3)))
    apply = roofline.cost("apply", roofline.Geometry((2, 3, 32, 32), (2, 16, 30, 30), (16, 3, 3, 3)))
    expected = least.roofline_us(roofline.DEVICES["H200"])
    if table.layers[0].pick == "library":
        expected += apply.roofline_us(roofline.DEVICES["H200"])
    assert table.layers[0].roofline_us == pytest.approx(expected, rel=1e-3)


def test_a_strided_bias_is_read_by_its_strides() -> None:
    case, x, z, weight, _ = layer("gram")
    wide = torch.randn(2 * 24)
    results = [
        ops.correlation(x, z, weight, bias=bias, algorithm="gram", **case.arguments) for bias in (wide[::2], wide[::2].clone())
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_torchs_newer_way_to_allow_tf32(precision: str) -> None:
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        conv.fp32_precision = matmul.fp32_precision = precision
        core = "mma_tf32" if precision == "tf32" else "ffma"
        case, x, z, weight, bias = layer("direct")
        assert configuration(x, z, weight, bias, "direct", **case.arguments).startswith(core)
        x, weight = torch.randn(64, 32), torch.randn(48, 32)
        assert configuration(x, x @ weight.T, weight, None, "direct").startswith(core)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_a_weight_that_may_not_be_written_is_not() -> None:
    case, x, z, weight, bias = layer("direct")
    with torch.inference_mode():
        frozen = weight.clone()
    for algorithm in ("direct", "library"):
        with pytest.raises(RuntimeError, match="inference tensor"):
            ops.hebbian_update_(frozen, x, z, 0.5, bias=bias, algorithm=algorithm, **case.arguments)
    assert torch.equal(frozen, weight)


def test_a_grid_that_does_not_fit_after_all_runs_phase_by_phase() -> None:
    case, x, z, weight, bias = layer("direct")
    found = re.search(r"(\d+) blocks of", configuration(x, z, weight, bias, "direct", **case.arguments))
    assert found
    assert int(found[1]) > 3  # more than one for each multiprocessor
    first = updated("direct")
    gpu.library().localsgd_shrink(1)  # beside another process, say
    try:
        assert torch.equal(updated("direct"), first)
    finally:
        gpu.library().localsgd_shrink(0)
