"""``GraphedStep`` with real captures: the bits of the plain loop, over boundary moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import needs_cuda
from models import TwoBlockResNet, batches, seeded
from torch import Tensor

from localsgd_ext import GraphedStep, LocalizedLearning, StaticModeSelection

pytestmark = needs_cuda

PATH = (0, 2, 3, 5, 1, 0)


def train(graphed: bool, dtype: torch.dtype | None, **options: Any) -> tuple[dict[str, Tensor], list[float], int]:
    """Weights, losses and the number of captures after one epoch at each place of the boundary."""
    model = seeded(TwoBlockResNet).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = StaticModeSelection(kind=lambda epoch: PATH[min(epoch, len(PATH) - 1)], l_max=1.0)
    local = LocalizedLearning(model, optimizer, epochs=len(PATH), preset="paper", schedule=schedule, lr=0.05, **options)
    data = [(x.cuda().to(memory_format=torch.channels_last), y.cuda()) for x, y in batches(8)]
    local.trace(data[0][0])

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    run = GraphedStep(local, step) if graphed else step
    losses = []
    for epoch in range(len(PATH)):
        losses += [run(x, y).item() for x, y in data]
        local.step((1.0, 0.9, 1.1)[epoch % 3])
    return {n: t.detach().cpu() for n, t in model.state_dict().items()}, losses, getattr(run, "captures", 0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"rule": "frozen"}, {"refresh": 3}], ids=str)
def test_the_bits_of_the_plain_loop(options: dict[str, Any], dtype: torch.dtype | None) -> None:
    weights, losses, captures = train(True, dtype, **options)
    expected, expected_losses, _ = train(False, dtype, **options)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    if "refresh" not in options:
        assert captures == len(PATH)
