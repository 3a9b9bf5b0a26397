"""The write: norm, rounding, skipped updates, version counters, layouts of the weight."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, EMPTY_CASES, Case
from oracle import FP64
from torch import Tensor

from localsgd_ext import ops, reference

IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(
        ops, id="ops", marks=pytest.mark.skipif(not ops.is_compiled(), reason="without the compiled module it is the reference")
    ),
]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

compiled_only = pytest.mark.skipif(not ops.is_compiled(), reason="the kernels are tested here")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

LAYER = Case("", (2, 6, 9, 8), (10, 6, 3, 3), padding=1, bias=True)


def layer(case: Case = LAYER) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, weight, bias = case.sample()
    return weight, x, case.forward(x, weight, bias), bias


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@implementations
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moves_the_weight_by_lr_along_the_correlation(implementation, case: Case) -> None:
    weight, x, z, bias = layer(case)
    for normalize, lr in ((True, 0.25), (True, -0.01), (False, 1e-6)):
        expected = weight.to(FP64)
        d = reference.correlation(x.to(FP64), z.to(FP64), expected, **case.arguments)
        expected = expected + lr * d / (d.norm() if normalize else 1)
        updated = weight.clone()
        implementation.hebbian_update_(updated, x, z, lr, bias=bias, normalize=normalize, **case.arguments)
        torch.testing.assert_close(updated, expected.float(), rtol=1e-6, atol=1e-6)
        if normalize:
            assert (updated - weight).norm().item() == pytest.approx(abs(lr), rel=1e-4)


@implementations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("d_dtype", [torch.float32, torch.float64])
def test_low_precision_weights_are_rounded_once(implementation, dtype: torch.dtype, d_dtype: torch.dtype) -> None:
    weight = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, 1e-7, -3e-8, 6e4, 1e-40])]).to(dtype)
    d = torch.randn(weight.shape, dtype=d_dtype)
    exact = weight.to(FP64) + 0.5 / d.to(FP64).norm() * d.to(FP64)
    implementation.apply_update_([weight], [d], 0.5)
    torch.testing.assert_close(weight, exact.to(dtype), rtol=0, atol=1e-15 if dtype == FP64 else 0)


@pytest.mark.skipif(not ops.is_compiled(), reason="the kernels' own conversions are tested here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_low_precision_number_survives_a_step_of_zero(dtype: torch.dtype) -> None:
    """All 65536 bit patterns through load and store: NaN stays NaN, everything else keeps its bits."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    weight = patterns.view(dtype).clone()
    ops.apply_update_([weight], [torch.ones(weight.shape)], 0.0)
    original = patterns.view(dtype)
    assert torch.equal(weight.isnan(), original.isnan())
    number = ~original.isnan() & (original != 0)  # -0.0 + 0.0 is 0.0
    assert torch.equal(bits(weight)[number], patterns[number])


@implementations
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unusable_norm_leaves_every_bit_and_is_counted(implementation, dtype: torch.dtype, value: float) -> None:
    weight, x, _, _ = layer()
    z = torch.zeros(2, 10, 9, 8)
    z[1, 3, 4, 4] = value
    weight[0, 0, 0, 0] = math.nan  # not even a NaN's payload may change
    weight = weight.to(dtype)
    before, skipped = weight.clone(), torch.tensor(2**32 - 1)  # about to overflow 32 bits
    for normalize in (True, False):
        implementation.hebbian_update_(weight, x, z, 0.1, padding=1, normalize=normalize, skipped=skipped)
    assert torch.equal(bits(weight), bits(before))
    assert skipped.item() == 2**32 + 1


@implementations
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty_batch_is_skipped(implementation, case: Case) -> None:
    weight, x, z, bias = layer(case)
    before, skipped = weight.clone(), torch.zeros(1, dtype=torch.int64)
    implementation.hebbian_update_(weight, x, z, 0.1, bias=bias, skipped=skipped, **case.arguments)
    assert torch.equal(weight, before)
    assert skipped.tolist() == [1]


@implementations
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 1e-44])
def test_norm_neither_overflows_nor_vanishes(implementation, magnitude: float) -> None:
    weight = torch.zeros(64, 8)
    d = torch.full((64, 8), magnitude)
    skipped = torch.zeros(1, dtype=torch.int64)
    implementation.apply_update_([weight], [d], 2.0, skipped=skipped)
    assert skipped.item() == 0
    torch.testing.assert_close(weight, torch.full((64, 8), 2.0 / math.sqrt(512)))


@implementations
def test_many_tensors_each_by_its_own_norm(implementation) -> None:
    shapes = [(7,), (129, 151), (3, 2, 3, 3), (0,), (40000,), ()]
    weights, ds = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    ds[2].fill_(math.nan)
    expected = [
        w + 0.1 * d / d.norm() if i not in (2, 3) else w.clone() for i, (w, d) in enumerate(zip(weights, ds, strict=True))
    ]
    each, total = torch.zeros(6, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    copies = [w.clone() for w in weights]
    implementation.apply_update_(weights, ds, 0.1, skipped=each)
    implementation.apply_update_(copies, ds, 0.1, skipped=total)
    for weight, copy, want in zip(weights, copies, expected, strict=True):
        torch.testing.assert_close(weight, want)
        assert torch.equal(weight, copy)
    assert each.tolist() == [0, 0, 1, 1, 0, 0]
    assert total.item() == 2
    implementation.apply_update_([], [], 0.1)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lr_may_be_a_tensor(implementation, dtype: torch.dtype) -> None:
    weight, x, z, _ = layer()
    other = weight.clone()
    implementation.hebbian_update_(weight, x, z, -0.25, padding=1)
    implementation.hebbian_update_(other, x, z, torch.tensor(-0.25, dtype=dtype), padding=1)
    assert torch.equal(weight, other)


@implementations
@pytest.mark.parametrize("arrangement", ["channels_last", "transposed", "sliced", "offset"])
def test_weights_of_any_strides(implementation, arrangement: str) -> None:
    weight, x, z, _ = layer()
    if arrangement == "channels_last":
        strided = weight.to(memory_format=torch.channels_last)
    elif arrangement == "transposed":
        strided = weight.transpose(0, 3).contiguous().transpose(0, 3)
    else:
        base = torch.full((10, 6, 3, 7), 5.0)
        strided = base[..., :3] if arrangement == "offset" else base[..., 1::2]
        strided.copy_(weight)
    assert strided.stride() != weight.stride()
    implementation.hebbian_update_(weight, x, z, 0.5, padding=1)
    implementation.hebbian_update_(strided, x, z, 0.5, padding=1)
    torch.testing.assert_close(strided, weight)
    if arrangement in ("sliced", "offset"):
        untouched = base[..., 3:] if arrangement == "offset" else base[..., ::2]
        assert (untouched == 5).all()


@implementations
def test_autograd_notices_the_write(implementation) -> None:
    weight, x, _, _ = layer()
    weight.requires_grad_()
    version = weight._version
    x.requires_grad_()
    output = LAYER.forward(x, weight, None)
    implementation.hebbian_update_(weight, x, output, 0.1, padding=1)
    assert weight._version > version
    assert weight.requires_grad
    assert weight.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    version = weight._version
    implementation.apply_update_([weight], [torch.ones_like(weight)], 0.1)
    assert weight._version > version


@implementations
def test_version_of_the_counter_moves_too(implementation) -> None:
    weight, x, z, _ = layer()
    skipped = torch.zeros(1, dtype=torch.int64)
    version = skipped._version
    implementation.hebbian_update_(weight, x, torch.zeros_like(z), 0.1, padding=1, skipped=skipped)
    assert skipped._version > version


@pytest.mark.skipif(not ops.is_compiled(), reason="threads are the kernels' business")
def test_norm_has_the_same_bits_for_any_number_of_threads() -> None:
    d, results = torch.randn(300_000), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weight = torch.zeros(300_000, dtype=torch.float64)
        ops.apply_update_([weight], [d], 1.0)
        results.append(weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not ops.is_compiled(), reason="nothing to compare the reference with")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference_over_many_steps(case: Case) -> None:
    weight, x, _, bias = layer(case)
    other = weight.clone()
    for step in range(5):
        lr = 0.1 if step % 2 else -0.05
        ops.hebbian_update_(weight, x, case.forward(x, weight, bias), lr, bias=bias, z_is_output=True, **case.arguments)
        reference.hebbian_update_(other, x, case.forward(x, other, bias), lr, bias=bias, **case.arguments)
    torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", [ops, reference], ids=["ops", "reference"])
def test_nothing_waits_for_the_device(implementation) -> None:
    """Tensors without data stand for a device: whatever would wait for a value of theirs raises."""
    weight, x, z, lr = (torch.empty(shape, device="meta") for shape in ((4, 3, 3, 3), (2, 3, 8, 8), (2, 4, 6, 6), ()))
    skipped = torch.empty((), dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError):
        lr.item()
    for step in (0.1, lr):
        implementation.hebbian_update_(weight, x, z, step, skipped=skipped)
        implementation.apply_update_([weight, weight], [weight, weight], step, skipped=skipped.expand(2).clone())


def few_rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A layer whose D is larger than all of x and z: its update is made without it."""
    x, weight = torch.randn(8, 96), torch.randn(160, 96)
    return weight, x.to(dtype), (x @ weight.T).to(dtype)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_few_rows_move_the_weight_as_their_correlation_does(dtype: torch.dtype, transposed: bool, normalize: bool) -> None:
    weight, x, z = few_rows(dtype)
    if transposed:
        x, z = x.T.contiguous().T, z.T.contiguous().T
    d = z.to(FP64).T @ x.to(FP64)
    lr = 0.25 if normalize else 1e-3
    expected = weight.to(FP64) + lr * d / (d.norm() if normalize else 1)
    ops.hebbian_update_(weight, x, z, lr, normalize=normalize, algorithm="direct")
    torch.testing.assert_close(weight.to(FP64), expected, rtol=2e-7, atol=3e-7)


@compiled_only
@pytest.mark.parametrize("seed", range(8))
def test_few_rows_that_cancel_each_other_are_correlated_first(seed: int) -> None:
    """Their norm, a difference of equal numbers, is what rounding leaves of it, and would make a step of any length."""
    torch.manual_seed(seed)
    weight, x, z = few_rows()
    order = torch.randperm(16)
    x, z = torch.cat([x, x])[order], torch.cat([z, -z])[order]
    before = weight.clone()
    ops.hebbian_update_(weight, x, z, 0.25, algorithm="direct")
    assert (weight - before).norm().item() <= 0.25 * (1 + 1e-4)


@compiled_only
@pytest.mark.parametrize("where", ["x", "z"])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_few_unusable_rows_leave_every_bit_and_are_counted(where: str, value: float) -> None:
    weight, x, z = few_rows()
    given, skipped = {"x": x, "z": z}, torch.zeros((), dtype=torch.int64)
    given[where].mul_(0) if value == 0 else given[where][3, 5:7].fill_(value)
    before = weight.clone()
    ops.hebbian_update_(weight, given["x"], given["z"], 0.25, skipped=skipped, algorithm="direct")
    assert torch.equal(bits(weight), bits(before))
    assert skipped.item() == 1


@compiled_only
@pytest.mark.parametrize(("x_scale", "z_scale"), [(1e-21, 1e-21), (1e-18, 1), (1e18, 1), (1e36, 1), (1e20, 1e20)])
def test_few_rows_of_any_size(x_scale: float, z_scale: float) -> None:
    """Where D leaves fp32's range, as in the last one, the update is skipped like any other."""
    weight, x, z = few_rows()
    x, z = x * x_scale, z * z_scale
    d = (z.T @ x).to(FP64)
    updated = torch.zeros_like(weight)
    ops.hebbian_update_(updated, x, z, 0.25, algorithm="direct")
    expected = 0.25 * d / d.norm() if d.isfinite().all() else torch.zeros_like(d)
    torch.testing.assert_close(updated, expected.float(), rtol=2e-6, atol=1e-3 if d.norm() < 1e-37 else 1e-8)


@implementations
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tensors_at_once_as_one_by_one(implementation, threads: int) -> None:
    """Of every size around the chunks that are summed apart, in several dtypes and orders, one of them unusable."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = [(1,), (3, 5), (16384,), (16385,), (7, 3, 3, 3), (300, 200), (40_000,), (64, 32, 3, 3)]
        dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
        weights = [torch.randn(size).to(dtypes[i % 4]) for i, size in enumerate(sizes)]
        weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
        weights.append(torch.randn(10, 12)[:, ::2])
        correlations = [torch.randn(w.shape, dtype=FP64 if i % 3 == 0 else torch.float32) for i, w in enumerate(weights)]
        correlations[3][5] = math.nan
        expected = [w.clone() for w in weights]
        for w, d in zip(expected, correlations, strict=True):
            implementation.apply_update_([w], [d], 0.5)
        skipped = torch.zeros(len(weights), dtype=torch.int64)
        implementation.apply_update_(weights, correlations, 0.5, skipped=skipped)
        assert all(torch.equal(bits(w), bits(e)) for w, e in zip(weights, expected, strict=True))
        assert skipped.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    finally:
        torch.set_num_threads(before)


@implementations
def test_a_weight_that_is_there_twice_moves_twice(implementation) -> None:
    weight, d = torch.zeros(50_000), torch.randn(50_000)
    implementation.apply_update_([weight, weight, weight[:7]], [d, d, torch.ones(7)], 0.5)
    expected = 2 * 0.5 * d / d.norm(dtype=FP64)
    expected[:7] += 0.5 / 7**0.5
    torch.testing.assert_close(weight, expected.float(), rtol=1e-5, atol=1e-7)
