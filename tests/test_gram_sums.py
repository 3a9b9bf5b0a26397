"""The sums that processes add up in the place of D, and D of them."""

import pytest
import torch
from cases import CASES, EMPTY_CASES, LAYOUTS, Case

from localsgd_ext import ops, reference

POINTWISE = [case for case in (*CASES, *EMPTY_CASES) if case.pointwise]
BOTH = pytest.mark.parametrize("implementation", [ops, reference], ids=["ops", "reference"])


def size(case: Case) -> int:
    channels = case.weight[1]
    return case.groups * channels * (channels + 1) // 2 + (case.groups * channels if case.bias else 0)


def arguments(case: Case) -> dict:
    """Without what linear layers do not have."""
    return case.arguments if case.dims else {}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_d_of_the_sums_is_the_correlation(case, layout, implementation):
    x, weight, bias = case.sample(torch.float64, layout=layout)
    sums = implementation.gram_sums(x, weight, bias=bias, **arguments(case))
    assert sums.shape == (size(case),)
    d = implementation.correlation_of_gram_sums(sums, weight, bias=bias, groups=case.groups)
    expected = reference.correlation(x, None, weight, bias=bias, **arguments(case))
    torch.testing.assert_close(d, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(expected.abs().max() if d.numel() else 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_sums_of_lower_precision_are_float32(case, dtype):
    x, weight, bias = case.sample(dtype)
    sums = ops.gram_sums(x, weight, bias=bias, **arguments(case))
    assert sums.dtype == torch.float32
    d = ops.correlation_of_gram_sums(sums, weight, bias=bias, groups=case.groups)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    expected = reference.correlation(wide[0], None, wide[1], bias=wide[2], **arguments(case))
    if d.numel() and expected.norm() > 0:
        assert (d - expected).norm() / expected.norm() < 1e-5


def test_what_is_in_them_and_where():
    x = torch.randn(3, 6, 5, 2, dtype=torch.float64)
    weight, bias = torch.zeros(4, 3, 1, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    expected = []
    for group in x.chunk(2, dim=1):
        rows = group.movedim(1, -1).reshape(-1, 3)
        gram = rows.T @ rows
        expected += [gram[i, j] for i in range(3) for j in range(i + 1)]
    expected += list(x.sum((0, 2, 3)))
    for implementation in (ops, reference):
        sums = implementation.gram_sums(x, weight, bias=bias, groups=2)
        torch.testing.assert_close(sums, torch.stack(expected))
        torch.testing.assert_close(implementation.gram_sums(x, weight, groups=2), torch.stack(expected[:-6]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [33, 300, 515])
def test_the_same_bits_with_any_number_of_threads(channels, dtype):
    """Every process makes D for itself."""
    x, weight = torch.randn(200, channels, dtype=dtype), torch.randn(2 * channels, channels, dtype=dtype)
    bias = torch.randn(2 * channels, dtype=dtype)
    sums = ops.gram_sums(x, weight, bias=bias)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.correlation_of_gram_sums(sums, weight, bias=bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_not_a_number_reaches_every_row():
    x, weight = torch.randn(40, 6), torch.randn(9, 6)
    x[3, 2] = float("nan")
    d = ops.correlation_of_gram_sums(ops.gram_sums(x, weight), weight)
    assert d.isnan().any(dim=1).all()


def test_any_strides():
    """Of the sums, as of a bucket, and of weight and bias."""
    x, weight, bias = torch.randn(50, 6), torch.randn(10, 12)[:, ::2], torch.randn(20)[::2]
    sums = ops.gram_sums(x, weight, bias=bias)
    spread = torch.stack([sums, sums], dim=1)[:, 0]
    expected = ops.correlation_of_gram_sums(sums, weight.contiguous(), bias=bias.contiguous())
    assert torch.equal(ops.correlation_of_gram_sums(spread, weight, bias=bias), expected)


@BOTH
def test_mistakes(implementation):
    x, weight = torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 1, 1)
    of = implementation.correlation_of_gram_sums
    with pytest.raises(ValueError, match=r"kernel of size 1"):
        implementation.gram_sums(x, torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match=r"sums must have shape \(6,\), got \(9,\)"):
        of(torch.zeros(9), weight)
    with pytest.raises(ValueError, match=r"sums must have shape \(9,\), got \(3, 3\)"):
        of(torch.zeros(3, 3), weight, bias=torch.zeros(4))
    with pytest.raises(TypeError, match=r"sums must be float32 or float64, got "):
        of(torch.zeros(6, dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        of(torch.zeros(9), weight, bias=torch.zeros(3))
    for wrong, groups in ((torch.zeros(4, 3, 2, 1), 1), (weight, 3), (weight, 0), (torch.zeros(4), 1)):
        with pytest.raises(ValueError, match=rf"weight must have a kernel of size 1 and {groups} groups of rows, got shape"):
            of(torch.zeros(6), wrong, groups=groups)
