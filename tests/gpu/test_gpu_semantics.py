"""What an update promises on the GPU whatever the algorithm: streams, bad numbers, sizes, devices."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from layers import DEVICE, FEW, FEW_ELIGIBLE, LOW, layer, needs_cuda
from torch import Tensor

from localsgd_ext import apply_update_, correlation, hebbian_update_, ops, reference


def counter() -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("case", "algorithm"), FEW_ELIGIBLE, ids=lambda v: str(v))
def test_zero_or_bad_norms_leave_the_weight_and_count(case: Case, algorithm: str, dtype: torch.dtype, value: float) -> None:
    given = layer(case, dtype)
    if value == 0.0:
        given.x.zero_()  # x and z, as D is their product; a bias alone would make z
        given.z.zero_()
        if given.bias is not None:
            given.bias.zero_()
    else:
        given.x[(0,) * given.x.dim()] = value
        given.z[(0,) * given.z.dim()] = value
    before, skipped = given.weight.clone(), counter()
    for lr in (0.5, torch.tensor(-0.5, device=DEVICE)):
        given.update(lr, algorithm, skipped=skipped)
    assert torch.equal(given.weight, before)
    assert skipped.item() == 2


@needs_cuda
@pytest.mark.parametrize(("case", "algorithm"), FEW_ELIGIBLE, ids=lambda v: str(v))
def test_side_streams(case: Case, algorithm: str) -> None:
    """Work goes to the current stream, behind what is queued there; two streams do not share a workspace."""
    start, expected = layer(case).weight, layer(case)
    expected.update(0.1, algorithm)
    layers = [layer(case) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(10):
        for given, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                given.weight.zero_()
                torch.cuda._sleep(100_000)
                given.weight.copy_(start)  # seen only by an update that waits for it
                given.update(0.1, algorithm)
    torch.cuda.synchronize()
    for given in layers:
        if algorithm in ("auto", "library"):  # cuBLAS promises the same bits for one stream only
            torch.testing.assert_close(given.weight, expected.weight)
        else:
            assert torch.equal(given.weight, expected.weight)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_lr_from_the_device_or_the_host(case: Case) -> None:
    results = []
    for lr in (0.25, torch.tensor(0.25, device=DEVICE), torch.tensor([0.25], dtype=torch.float64, device=DEVICE)):
        given = layer(case)
        given.update(lr)
        results.append(given.weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_weights_of_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    given = layer(case)
    weight = given.weight.to(dtype)
    before = weight.clone()
    d = correlation(given.x, given.z, weight, **given.arguments)
    hebbian_update_(weight, given.x, given.z, 2.0, **given.arguments)
    expected = (before.double() + 2.0 * d.double() / d.double().norm()).to(dtype)
    torch.testing.assert_close(weight, expected, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6)


def test_version_counter_and_grad_mode() -> None:
    given = layer(FEW[0])
    given.weight.requires_grad_()
    version = given.weight._version
    given.update(0.1)
    assert given.weight._version > version
    assert given.weight.grad_fn is None


def test_many_weights_in_one_apply() -> None:
    """More than fit into one launch, of mixed sizes, with a counter each."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = [torch.randn(3 + 37 * i, generator=generator, device=DEVICE) for i in range(200)]
    correlations = [torch.randn(w.shape, generator=generator, device=DEVICE) for w in weights]
    correlations[5].zero_()
    correlations[150][7] = float("nan")
    expected = [w.clone() for w in weights]
    skipped = torch.zeros(200, dtype=torch.int64, device=DEVICE)
    apply_update_(weights, correlations, -0.5, skipped=skipped)
    for i, (weight, before, d) in enumerate(zip(weights, expected, correlations, strict=True)):
        if i in (5, 150):
            assert torch.equal(weight, before)
        else:
            torch.testing.assert_close(weight, before - 0.5 * d / d.norm(), rtol=1e-5, atol=1e-6)
    assert skipped.nonzero().flatten().tolist() == [5, 150]


@needs_cuda
def test_several_devices_are_refused() -> None:
    x, z, weight = torch.randn(8, 4), torch.randn(8, 6), torch.randn(6, 4)
    for move in ("x", "z", "weight"):
        given = {"x": x, "z": z, "weight": weight}
        given[move] = given[move].cuda()
        with pytest.raises(ValueError, match="must be on the weight's device"):
            correlation(given["x"], given["z"], given["weight"])
        with pytest.raises(ValueError, match="must be on the weight's device"):
            hebbian_update_(given["weight"], given["x"], given["z"], 0.1)
    with pytest.raises(ValueError, match="must be on"):
        apply_update_([weight.cuda()], [weight], 0.1)
    with pytest.raises(ValueError, match="skipped must be on the weight's device"):
        hebbian_update_(weight.cuda(), x.cuda(), z.cuda(), 0.1, skipped=torch.zeros(1, dtype=torch.int64))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    given, expected = layer(FEW[0], device="cuda:1"), layer(FEW[0], device="cuda:0")
    given.update(0.1)
    expected.update(0.1)
    assert torch.equal(given.weight.cpu(), expected.weight.cpu())


BIG = 2**31 + 4096


def _needs(gib: float) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib:.0f} GiB of free device memory")


def _integers(*shape: int) -> Tensor:
    """Sums of products of these are exact in fp32, in whatever order."""
    return torch.randint(-2, 3, shape, device=DEVICE).bfloat16()


@needs_cuda
@pytest.mark.parametrize("algorithm", ["gram", "direct"])
def test_more_than_2_to_31_elements_of_a_linear_layer(algorithm: str) -> None:
    """The first and the last row count, all others are 0: indices of 32 bits would miss the last."""
    _needs(16)
    x = torch.zeros(BIG // 256 + 1, 256, dtype=torch.bfloat16, device=DEVICE)
    x[0], x[-1] = _integers(256), _integers(256)
    weight = _integers(16, 256).float()
    ends = x[[0, -1]].double()
    z = torch.zeros(x.shape[0], 16, dtype=torch.float32, device=DEVICE)
    z[[0, -1]] = (ends @ weight.double().t()).float()
    d = correlation(x, z, weight, z_is_output=True, algorithm=algorithm)
    assert torch.equal(d.double(), weight.double() @ ends.t() @ ends)


@needs_cuda
def test_more_than_2_to_31_elements_of_a_depthwise_layer() -> None:
    _needs(24)
    shape = (BIG // (64 * 256 * 256) + 1, 64, 256, 256)
    x, z = (torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    x[0], x[-1], z[0], z[-1] = (_integers(*shape[1:]) for _ in range(4))
    weight = torch.randn(64, 1, 3, 3, device=DEVICE)
    d = correlation(x, z, weight, padding=1, groups=64, algorithm="depthwise")
    expected = reference.correlation(x[[0, -1]].double(), z[[0, -1]].double(), weight.double(), padding=1, groups=64)
    assert torch.equal(d.double(), expected)


@needs_cuda
def test_more_than_2_to_31_elements_of_a_weight() -> None:
    _needs(40)
    weight = torch.zeros(BIG, dtype=torch.bfloat16, device=DEVICE)
    d = torch.ones(BIG, device=DEVICE)
    apply_update_([weight], [d], float(BIG) ** 0.5)
    assert (weight == 1).all()


def test_explicit_algorithms_that_do_not_fit_are_refused() -> None:
    given = layer(next(case for case in FEW if case.name == "conv3x3"))
    with pytest.raises(ValueError, match="gram"):
        given.update(0.1, "gram")
    with pytest.raises(ValueError, match="depthwise"):
        given.update(0.1, "depthwise")
    if ops.is_compiled(DEVICE):
        with pytest.raises(ValueError, match="algorithm 'winograd' has kernels for a CPU only"):
            given.update(0.1, "winograd")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_picks_are_explained(case: Case) -> None:
    if not ops.is_compiled(DEVICE):
        pytest.skip("no kernels are compiled for CUDA")
    given = layer(case)
    plan = ops.plan(given.x, given.z, given.weight, **given.arguments)
    assert plan.pick in case.algorithms
    assert plan.reason
