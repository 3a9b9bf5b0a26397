"""explain(): one row per layer call, the picks that training makes, and a model that is as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import localsgd_ext
from localsgd_ext import explain, ops

compiled = pytest.mark.skipif(not ops.is_compiled(), reason="without kernels there is nothing to choose from")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)  # registered first, runs last
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.stem = nn.Conv2d(3, 16, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        x = self.depthwise(self.depthwise(x))
        return self.head(self.expand(x).mean((2, 3)))


@pytest.fixture
def benchmark_mode():
    localsgd_ext.benchmark = True
    yield
    assert ops.benchmark  # the package's switch is the operations'
    localsgd_ext.benchmark = False


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@compiled
def test_rows_are_the_calls_in_order_with_what_auto_picks() -> None:
    rows = list(explain(Net(), channels_last(4, 3, 32, 32)))
    assert [row.name for row in rows] == ["stem", "depthwise", "depthwise", "expand", "head"]
    assert [row.pick for row in rows[1:4]] == ["depthwise", "depthwise", "gram"]
    assert rows[0].geometry == "conv2d 3->16 k3x3 s1x1 p1x1 d1x1 g1 4x(32x32->32x32)"
    assert rows[4].geometry == "linear 64->10 x 4 rows"
    costs = {cost.algorithm: cost for cost in rows[0].costs}
    assert [name for name, cost in costs.items() if cost.automatic] == ["winograd", "direct", "library"]
    assert costs["gram"].why_not == "needs a kernel of size 1 or a linear layer"
    for row in rows:
        cheapest = min((cost for cost in row.costs if cost.automatic), key=lambda cost: cost.estimated_us)
        assert cheapest.algorithm == row.pick
        assert all(cost.measured_us is None for cost in row.costs)


class CalledByKeyword(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(input=x))
        x = self.depthwise(input=self.depthwise(x))
        return self.head(input=self.expand(input=x).mean((2, 3)))


def test_layers_may_be_called_by_keyword() -> None:
    x = channels_last(4, 3, 32, 32)
    assert explain(CalledByKeyword(), x) == explain(Net(), x)


@compiled
def test_dtypes_and_layout_are_those_of_the_call() -> None:
    x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        stem = explain(Net(), x).layers[0]
    assert (stem.x_dtype, stem.z_dtype, stem.layout) == (torch.float32, torch.bfloat16, "channels_last")
    assert explain(Net(), x.contiguous()).layers[0].layout == "contiguous"


@compiled
def test_benchmark_times_once_and_picks_the_fastest(benchmark_mode: None) -> None:
    net, x = Net(), torch.randn(2, 3, 24, 24)
    first, second = explain(net, x), explain(net, x)
    assert first == second  # measurements kept: timing again would give other numbers
    for row in first:
        timed = [cost for cost in row.costs if cost.automatic]
        assert all(cost.measured_us is not None and cost.measured_us > 0 for cost in timed)
        assert min(timed, key=lambda cost: cost.measured_us).algorithm == row.pick
        assert row.reason.startswith("measured")
    assert "µs (measured)" in str(first)
    assert explain(net, torch.randn(3, 3, 24, 24)).layers[0].costs != first.layers[0].costs


@compiled
def test_prints_an_aligned_table() -> None:
    text = str(explain(Net(), channels_last(4, 3, 32, 32)))
    lines = text.splitlines()
    assert len(lines) == 6
    column = lines[0].index("pick")
    assert [line[column:].split()[0] for line in lines[2:5]] == ["depthwise", "depthwise", "gram"]
    assert lines[0].split()[:5] == ["layer", "geometry", "x", "z", "layout"]


def test_leaves_the_model_as_it_was() -> None:
    net = Net()
    net.norm.eval()
    before = copy.deepcopy(net.state_dict())
    explain(net, torch.randn(4, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert net.training
    assert not net.norm.training
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError):
        explain(net, torch.randn(4, 5, 32, 32))  # the model fails: still nothing may stay behind
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


def test_other_devices_run_the_reference() -> None:
    rows = explain(Net().to("meta"), torch.randn(4, 3, 32, 32, device="meta")).layers
    assert {row.pick for row in rows} == {"reference"}
    assert rows[0].reason == "no kernels are compiled for meta: no kernel is built for meta devices"
    assert "reference" in str(explain(Net().to("meta"), torch.randn(4, 3, 32, 32, device="meta")))
