"""Every case, algorithm, dtype and layout on the GPU: at most twice the error of PyTorch's own operation, against fp64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EMPTY_CASES, LAYOUTS, Case
from layers import DEVICE, ELIGIBLE, FEW, LOW, layer

from benchmarks.gpu_parity import DTYPES, judge
from localsgd_ext import correlation, reference

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_fp64(case: Case, layout: str, dtype: str) -> None:
    for algorithm, parity in judge(case, dtype, layout, DEVICE).items():
        assert parity.ok, f"{algorithm}: {parity}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "algorithm"), ELIGIBLE, ids=lambda v: str(v))
def test_same_bits_every_run(case: Case, algorithm: str, layout: str) -> None:
    if algorithm == "library":
        pytest.skip("as deterministic as the library is")
    for dtype in LOW:
        given = layer(case, dtype, layout)
        first = given.correlation(algorithm)
        for _ in range(5):
            assert torch.equal(given.correlation(algorithm), first)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_update_and_correlation_with_apply_give_the_same_weight(case: Case) -> None:
    for algorithm in case.algorithms:
        given = layer(case)
        d = given.correlation(algorithm)
        expected = given.weight.clone()
        reference.apply_update_([expected], [d], 0.3)
        given.update(0.3, algorithm)
        torch.testing.assert_close(given.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty_batch_has_no_correlation(case: Case) -> None:
    for algorithm in ("auto", *case.algorithms):
        given = layer(case)
        before = given.weight.clone()
        assert not given.correlation(algorithm).any()
        skipped = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        given.update(0.3, algorithm, skipped=skipped)
        assert torch.equal(given.weight, before)
        assert skipped.item() == 1


def test_auto_reads_the_z_it_is_given() -> None:
    x, weight = torch.randn(64, 32, device=DEVICE), torch.randn(128, 32, device=DEVICE)
    z = torch.randn(64, 128, device=DEVICE)  # not the layer's output
    torch.testing.assert_close(correlation(x, z, weight), (z.double().t() @ x.double()).float(), rtol=1e-4, atol=1e-4)
