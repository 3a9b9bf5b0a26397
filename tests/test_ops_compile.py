"""The registered operators: opcheck, torch.compile, torch.export, fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, EMPTY_CASES, Case
from torch import Tensor

from localsgd_ext import ops

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

PICKED = (
    "conv3x5-mixed",
    "conv4x4-same",
    "conv4x3-circular-same",
    "expand1x1",
    "depthwise-multiplier",
    "conv1d-strided",
    "conv3d",
)
SOME = [case for case in CASES if case.name in (*PICKED, "linear-sequence", "1x1-unbatched")] + [EMPTY_CASES[0]]


def schema_arguments(case: Case) -> tuple[Any, ...]:
    as_list = lambda v: [v] if isinstance(v, int) else list(v)  # noqa: E731
    same = case.padding == "same"
    padding = [0] if isinstance(case.padding, str) else as_list(case.padding)
    return as_list(case.stride), padding, same, as_list(case.dilation), case.groups, case.padding_mode


@pytest.mark.parametrize("case", SOME, ids=str)
def test_opcheck(case: Case) -> None:
    x, weight, bias = case.sample()
    z = case.forward(x, weight, bias)
    skipped = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(torch.ops.localsgd_ext.correlation, (x, z, weight, bias, *schema_arguments(case), False, "auto"))
    for lr in ((0.1, None), (0.0, torch.tensor(0.1))):
        torch.library.opcheck(
            torch.ops.localsgd_ext.hebbian_update_,
            (weight, x, z, *lr, bias, *schema_arguments(case), True, True, "auto", skipped),
        )


def test_opcheck_apply_update() -> None:
    weights, ds = [torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.zeros(5)]
    for skipped in (None, torch.zeros(2, dtype=torch.int64)):
        torch.library.opcheck(torch.ops.localsgd_ext.apply_update_, (weights, ds, 0.1, None, True, skipped))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compiles_whole_and_gives_the_same_bits(case: Case) -> None:
    x, weight, bias = case.sample()
    z = case.forward(x, weight, bias)

    def step(weight: Tensor, x: Tensor, z: Tensor, lr: Tensor, skipped: Tensor) -> Tensor:
        ops.hebbian_update_(weight, x, z, lr, bias=bias, skipped=skipped, **case.arguments)
        ops.hebbian_update_(weight, x, z, -0.25, bias=bias, skipped=skipped, z_is_output=True, **case.arguments)
        d = ops.correlation(x, z, weight, bias=bias, **case.arguments)
        ops.apply_update_([weight], [d], 0.5, skipped=skipped)
        return weight * 2  # reads what was written

    def run(function: Any) -> tuple[Tensor, ...]:
        w, skipped = torch.nn.Parameter(weight.clone()), torch.zeros(1, dtype=torch.int64)
        doubled = function(w, x, z, torch.tensor(0.125), skipped)
        return w.detach(), doubled.detach(), skipped

    torch._dynamo.reset()
    eager, compiled = run(step), run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert case.x[0] == 0 or not torch.equal(eager[0], weight)


def test_a_new_value_of_a_tensor_lr_does_not_recompile() -> None:
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    z = torch.nn.functional.conv2d(x, weight)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda lr: ops.hebbian_update_(weight, x, z, lr), fullgraph=True, backend=counter)
    for lr in (0.1, 0.01, -0.5):
        before = weight.clone()
        step(torch.tensor(lr))
        assert (weight - before).norm().item() == pytest.approx(abs(lr), rel=1e-4)
    assert counter.frame_count == 1


def test_inductor_keeps_the_write() -> None:
    weight, x = torch.randn(4, 3), torch.randn(5, 3)
    expected = weight.clone()
    ops.hebbian_update_(expected, x, x @ expected.t(), 0.5)

    @torch.compile(fullgraph=True)
    def step(weight: Tensor, x: Tensor) -> Tensor:
        z = x @ weight.t()
        ops.hebbian_update_(weight, x, z, 0.5)
        return z.relu()

    torch._dynamo.reset()
    step(weight, x)
    torch.testing.assert_close(weight, expected)


def test_fake_tensors_give_shape_and_dtype() -> None:
    with torch._subclasses.FakeTensorMode():
        x, weight = torch.empty(2, 3, 8, 8, dtype=torch.bfloat16), torch.empty(4, 3, 3, 3)
        d = ops.correlation(x, None, weight)
        assert d.shape == weight.shape
        assert d.dtype == torch.float32
        assert ops.correlation(x, None, weight.double()).dtype == torch.float64
        ops.hebbian_update_(weight, x, None, 0.1)


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return ops.correlation(x, self.conv(x), self.conv.weight)

    layer, x = Layer(), torch.randn(2, 3, 7, 7)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_subclasses_of_tensor_go_through_the_dispatcher() -> None:
    class Tagged(Tensor):
        pass

    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    z = torch.nn.functional.conv2d(x, weight)
    expected = ops.correlation(x, z, weight)
    assert torch.equal(ops.correlation(x.as_subclass(Tagged), z, weight), expected)
