"""``torch.compile`` of the whole model: the same numbers, no graph break, one compilation per boundary."""

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn

from localsgd_ext import LocalizedLearning, StaticModeSelection


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def train(compiled: bool, refresh: int | None = None, backend: str = "aot_eager") -> list[torch.Tensor]:
    """Four epochs with the boundary at 0, 0, 1, 1 and then 2."""
    model = build()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.randint(4, (4,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    local = LocalizedLearning(
        model,
        optimizer,
        epochs=8,
        preset="paper",
        schedule=StaticModeSelection(kind=lambda epoch: epoch // 2),
        lr=0.05,
        refresh=refresh,
    )
    local.trace(x)
    forward = torch.compile(model, backend=backend) if compiled else model
    for _ in range(5):
        for _ in range(2):
            loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        local.step(loss)
    assert local.boundary == 2
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_training_gives_the_same_weights_with_one_compilation_per_boundary():
    eager, compiled = train(compiled=False), train(compiled=True)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3  # boundaries 0, 1 and 2


def test_a_refresh_is_one_more_compilation_per_boundary():
    eager, compiled = train(compiled=False, refresh=2), train(compiled=True, refresh=2)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 5


def test_inductor_too():
    """The default backend, whose generated code reads and writes memory in an order of its own."""
    eager, compiled = train(compiled=False), train(compiled=True, backend="inductor")
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3
