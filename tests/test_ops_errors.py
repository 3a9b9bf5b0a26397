"""Bad arguments: the same errors, in the same words, from the kernels and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from localsgd_ext import ops, reference

IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(
        ops, id="ops", marks=pytest.mark.skipif(not ops.is_compiled(), reason="without the compiled module it is the reference")
    ),
]

X, Z, W = torch.randn(2, 6, 8, 8), torch.randn(2, 10, 6, 6), torch.randn(10, 6, 3, 3)

CORRELATION_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X.long()}, TypeError, "x must be float16, bfloat16, float32 or float64"),
    ({"z": Z.to(torch.complex64)}, TypeError, "z must be float16"),
    ({"weight": W.int()}, TypeError, "weight must be float16"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor"),
    ({"weight": W[:, 0, 0, 0]}, ValueError, r"weight must have 2 \(linear\), 3, 4 or 5 \(conv\) dimensions, got shape \(10,\)"),
    ({"x": X[:, :5]}, ValueError, r"x must have 6 channels \(weight.shape\[1\] \* groups\), got shape \(2, 5, 8, 8\)"),
    ({"x": X[0, 0]}, ValueError, r"x must have 4 dimensions \(3 if unbatched\) for a weight of shape \(10, 6, 3, 3\)"),
    ({"x": X[0]}, ValueError, r"z must have shape \(10, 6, 6\), got \(2, 10, 6, 6\)"),
    ({"x": X[:1]}, ValueError, r"z must have shape \(1, 10, 6, 6\), got \(2, 10, 6, 6\)"),
    ({"padding": 1}, ValueError, r"z must have shape \(2, 10, 8, 8\), got \(2, 10, 6, 6\)"),
    ({"z": Z[:, :9]}, ValueError, r"z must have shape \(2, 10, 6, 6\), got \(2, 9, 6, 6\)"),
    ({"x": X[..., :2]}, ValueError, r"x of shape \(2, 6, 8, 2\) is smaller than the kernel"),
    ({"groups": 3}, ValueError, r"groups must be positive and divide weight.shape\[0\] = 10, got 3"),
    ({"groups": 0}, ValueError, "groups must be positive"),
    ({"groups": 2}, ValueError, "x must have 12 channels"),
    ({"stride": 0}, ValueError, "stride must be at least 1"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or 2 ints"),
    ({"dilation": (0, 1)}, ValueError, "dilation must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0"),
    ({"padding": "full"}, ValueError, "padding must be ints, 'same' or 'valid', got 'full'"),
    ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros, reflect, replicate, circular, got 'mirror'"),
    ({"bias": torch.zeros(9)}, ValueError, r"bias must have shape \(10,\), got \(9,\)"),
    ({"bias": torch.zeros(10, dtype=torch.int64)}, TypeError, "bias must be float16"),
    ({"x": X.to("meta")}, ValueError, "x must be on the weight's device cpu, got meta"),
    ({"z": Z.to("meta")}, ValueError, "z must be on the weight's device cpu, got meta"),
    (
        {"algorithm": "fft"},
        ValueError,
        "algorithm must be one of auto, gram, direct, depthwise, winograd, library, got 'fft'",
    ),
    (
        {"algorithm": "winograd", "weight": torch.randn(10, 6, 1, 1), "z": None},
        ValueError,
        r"algorithm 'winograd' needs a 2-d kernel of 3x3, stride, dilation and groups of 1, got weight of shape \(10, 6, 1, 1\)",
    ),
    *(
        ({"algorithm": "winograd", "z": None, **change}, ValueError, rf"algorithm 'winograd' needs .*, got weight .*{got}")
        for change, got in (
            ({"stride": (1, 2)}, r"\(10, 6, 3, 3\), stride=\(1, 2\), dilation=\(1, 1\) and groups=1"),
            ({"dilation": 2}, r"\(10, 6, 3, 3\), stride=\(1, 1\), dilation=\(2, 2\) and groups=1"),
            ({"groups": 2, "weight": torch.randn(10, 3, 3, 3)}, "and groups=2"),
            ({"weight": torch.randn(4, 8, 3), "x": X[:, :, 0].transpose(1, 2)}, r"\(4, 8, 3\), stride=\(1,\)"),
            ({"weight": torch.randn(10, 6, 1, 3, 3), "x": X.unsqueeze(2)}, r"\(10, 6, 1, 3, 3\)"),
        )
    ),
    ({"algorithm": "gram"}, ValueError, r"algorithm 'gram' needs a kernel of size 1 or a linear layer, got .*\(10, 6, 3, 3\)"),
    ({"algorithm": "depthwise"}, ValueError, r"algorithm 'depthwise' needs groups == in_channels > 1, got .* groups=1"),
    ({"weight": torch.randn(4, 5), "z": None}, ValueError, r"x must have shape \(..., 5\) for a weight of shape \(4, 5\)"),
    ({"weight": torch.randn(4, 8)}, ValueError, r"z must have shape \(2, 6, 8, 4\), got \(2, 10, 6, 6\)"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("change", "error", "message"), CORRELATION_ERRORS, ids=[m for *_, m in CORRELATION_ERRORS])
def test_correlation_refuses(implementation, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": X, "z": Z, "weight": W} | change
    with pytest.raises(error, match=message):
        implementation.correlation(**arguments)
    weight = arguments["weight"].clone()
    with pytest.raises(error, match=message):
        implementation.hebbian_update_(**(arguments | {"weight": weight}), lr=0.1)
    assert torch.equal(weight, arguments["weight"])


UPDATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"correlations": []}, ValueError, "weights and correlations must have the same length, got 1 and 0"),
    ({"correlations": [W[:9]]}, ValueError, r"correlations\[0\] must have shape \(10, 6, 3, 3\), got \(9, 6, 3, 3\)"),
    ({"correlations": [W.half()]}, TypeError, r"correlations\[0\] must be float32 or float64"),
    ({"weights": [W.int()]}, TypeError, "weight must be float16"),
    ({"weights": [W[:1].expand(10, 6, 3, 3)]}, ValueError, "weight must not overlap itself in memory"),
    ({"correlations": [W.to("meta")]}, ValueError, r"weights\[0\] and correlations\[0\] must be on cpu"),
    ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
    ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
    ({"skipped": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"skipped must have 1 element.*, got shape \(1, 1\)"),
    ({"skipped": torch.zeros(1)}, TypeError, "skipped must be int64"),
    ({"skipped": torch.zeros(2, dtype=torch.int64)}, ValueError, r"skipped must have 1 element.*, got shape \(2,\)"),
    ({"skipped": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "skipped must be on the weight's device cpu"),
    ({"lr": torch.zeros(2)}, ValueError, r"lr must be a float or a tensor of one element, got shape \(2,\)"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("change", "error", "message"), UPDATE_ERRORS, ids=[m for *_, m in UPDATE_ERRORS])
def test_apply_update_refuses(implementation, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weights": [W.clone()], "correlations": [W], "lr": 0.1} | change
    before = [w.clone() for w in arguments["weights"]]
    with pytest.raises(error, match=message):
        implementation.apply_update_(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments["weights"], strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hebbian_update_refuses_an_overlapping_weight(implementation) -> None:
    weight = torch.randn(1, 6, 3, 3).expand(10, 6, 3, 3)
    with pytest.raises(ValueError, match="weight must not overlap itself in memory"):
        implementation.hebbian_update_(weight, X, Z, 0.1)


@pytest.mark.parametrize("wrong", [None, [1.0], X.numpy()], ids=["None", "list", "ndarray"])
def test_operands_must_be_tensors(wrong) -> None:
    kind = type(wrong).__name__
    for call in (lambda: ops.correlation(wrong, Z, W), lambda: ops.hebbian_update_(wrong, X, Z, 0.1)):
        with pytest.raises(TypeError, match=f"must be tensors, got {kind}"):
            call()
    with pytest.raises(TypeError, match=f"must be tensors, got {kind}"):
        ops.apply_update_([W.clone()], [wrong], 0.1)


def test_one_tensor_is_not_taken_for_a_sequence() -> None:
    weight = W.clone()
    with pytest.raises(TypeError, match="weights must be a sequence of tensors, got a Tensor"):
        ops.apply_update_(weight, [W], 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="correlations must be a sequence of tensors, got a Tensor"):
        ops.apply_update_([weight], W, 0.1)  # type: ignore[arg-type]
    assert torch.equal(weight, W)


def test_several_tensors_are_a_sequence() -> None:
    weight = W.clone()
    with pytest.raises(TypeError, match="weights must be a sequence of tensors, got a generator"):
        ops.apply_update_((w for w in [weight]), [W], 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 1.5}, "stride must be an int or several, got 1.5"),
        ({"dilation": (1, 2.5)}, r"dilation must be an int or several, got \(1, 2.5\)"),
        ({"padding": 0.5}, "padding must be an int, several, or a name, got 0.5"),
        ({"groups": 1.0}, "groups must be an int, got 1.0"),
        ({"algorithm": None}, "algorithm must be a name, got None"),
        ({"padding_mode": 0}, "padding_mode must be a name, got 0"),
        ({"bias": [1.0]}, r"bias must be a tensor or None, got \[1.0\]"),
        ({"z_is_output": "yes"}, "z_is_output must be a bool, got 'yes'"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(wrong: dict[str, Any], message: str) -> None:
    weight = W.clone()
    with pytest.raises(TypeError, match=message):
        ops.correlation(X, Z, W, **wrong)
    with pytest.raises(TypeError, match=message):
        ops.hebbian_update_(weight, X, Z, 0.1, **wrong)
    assert torch.equal(weight, W)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": "0.1"}, "lr must be a number or a tensor, got '0.1'"),
        ({"normalize": "no"}, "normalize must be a bool, got 'no'"),
        ({"skipped": 3}, "skipped must be a tensor or None, got 3"),
    ],
)
def test_arguments_of_an_update_of_a_wrong_type_are_named(wrong: dict[str, Any], message: str) -> None:
    weight = W.clone()
    with pytest.raises(TypeError, match=message):
        ops.hebbian_update_(**{"weight": weight, "x": X, "z": Z, "lr": 0.1, **wrong})
    assert torch.equal(weight, W)


def test_plan_needs_kernels_for_the_device() -> None:
    with pytest.raises(RuntimeError, match="no kernels are compiled for device meta"):
        ops.plan(X.to("meta"), None, W.to("meta"))
