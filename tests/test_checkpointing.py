"""Localized learning under activation checkpointing: the recomputation must see the weights the forward saw."""

import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from localsgd_ext import LocalizedLearning, StaticModeSelection, reference


class Checkpointed(nn.Module):
    """Three convolutions and a head; all of it in one checkpointed segment, or none of it."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        widths = (3, 6, 8, 5)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 4)
        self.use_reentrant = use_reentrant

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return self.head(self.features(x))
        return self.head(checkpoint(self.features, x, use_reentrant=self.use_reentrant))


def learner(use_reentrant: bool | None, boundary: int, normalize: bool = True) -> tuple[Checkpointed, LocalizedLearning]:
    torch.manual_seed(3)
    model = Checkpointed(use_reentrant).double()
    schedule = StaticModeSelection(kind=lambda epoch: boundary)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalizedLearning(
        model, optimizer, epochs=4, preset="paper", schedule=schedule, lr=0.05, supervision=None, normalize=normalize
    )
    return model, local


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (4,), generator=generator)


def test_a_segment_across_the_boundary_gets_the_gradients_and_updates_of_a_plain_forward(batch):
    x, y = batch
    outcomes = []
    for use_reentrant in (None, False):
        model, local = learner(use_reentrant, boundary=2)
        local.trace(x)
        assert local.local_layers == ("convs.0", "convs.1")
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        local.step()  # makes the deferred updates
        outcomes.append((gradients, [p.detach().clone() for p in model.parameters()]))
    (plain_grads, plain_weights), (checkpointed_grads, checkpointed_weights) = outcomes
    torch.testing.assert_close(checkpointed_grads, plain_grads, rtol=1e-12, atol=0)
    torch.testing.assert_close(checkpointed_weights, plain_weights, rtol=1e-12, atol=0)


def test_the_recomputation_does_not_update_again(batch):
    x, y = batch
    model, local = learner(False, boundary=2, normalize=False)  # a normalised step would hide a doubled correlation
    local.trace(x)
    weight = model.convs[0].weight
    expected = weight.detach().clone()
    z = F.conv2d(x, expected, model.convs[0].bias.detach(), padding=1)
    reference.hebbian_update_(expected, x, z, 0.05, padding=1, normalize=False)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    local.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


def test_reentrant_checkpointing_is_refused_by_name(batch):
    x, _ = batch
    _, local = learner(True, boundary=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        warnings.filterwarnings("ignore", message="no layer will ever learn locally")
        with pytest.warns(UserWarning, match=r"(?s)convs\.0.*convs\.2.*use_reentrant=True: use False"):
            local.trace(x)
    assert local.plan.layers == ("head",)
