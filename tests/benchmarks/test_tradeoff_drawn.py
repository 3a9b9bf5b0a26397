"""benchmarks/tradeoff_drawn.py: the draws are unbiased, the second pass is that of samples that are there as often as they weigh."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.tradeoff import Run, Way
from benchmarks.tradeoff_drawn import backpropagate, draw, weighted_batch_norm
from localsgd_ext.train import config, data

STARTS = 2000


@pytest.mark.parametrize("count", [1, 3, 8, 11, 12])
@pytest.mark.parametrize("kind", ["alike", "one large", "skewed", "many nothing", "nothing"])
def test_every_sample_comes_as_often_as_its_weight_makes_up_for(kind: str, count: int) -> None:
    norms = {
        "alike": torch.ones(12),
        "one large": torch.tensor([1.0] * 11 + [1000.0]),
        "skewed": torch.logspace(-3, 3, 12),
        "many nothing": torch.tensor([0.0] * 9 + [1.0, 2.0, 3.0]),
        "nothing": torch.zeros(12),
    }[kind]
    total, often = torch.zeros(12, dtype=torch.float64), torch.zeros(12)
    for i in range(STARTS):
        drawn, weights = draw(norms, count, (i + 0.5) / STARTS)
        assert len(set(drawn.tolist())) == count  # none twice
        assert bool((weights >= 1 - 1e-9).all())
        total[drawn] += weights / STARTS
        often[drawn] += 1 / STARTS
    seen = often > 5 / STARTS  # the others are drawn too seldom for the grid of starts to tell
    torch.testing.assert_close(total[seen], torch.ones(int(seen.sum()), dtype=torch.float64), rtol=0.2, atol=0)
    assert often.sum() == pytest.approx(count, rel=1e-4)
    if kind in ("skewed", "one large") and 1 < count < 12:
        assert often[-1] == pytest.approx(1, abs=1e-3)
        assert often[0] < 1
    if kind == "alike":
        torch.testing.assert_close(often, torch.full((12,), count / 12), rtol=0.01, atol=0.001)


def test_a_weighted_sample_is_one_that_is_there_several_times() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, upstream = torch.randn(4, 3, 5, 2, dtype=torch.float64), torch.randn(4, 3, 5, 2, dtype=torch.float64)
    times = torch.tensor([1, 3, 2, 1])
    before = copy.deepcopy(norm.state_dict())
    one = x.clone().requires_grad_()
    mine = weighted_batch_norm(norm, one, times.double())
    gradients = torch.autograd.grad(mine, [one, norm.weight, norm.bias], upstream * times.reshape(-1, 1, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())

    other = x.clone().requires_grad_()
    repeated = F.batch_norm(other.repeat_interleave(times, 0), None, None, norm.weight, norm.bias, training=True)
    first = torch.tensor([0, 1, 4, 6])
    torch.testing.assert_close(mine, repeated[first])
    theirs = torch.autograd.grad(repeated, [other, norm.weight, norm.bias], upstream.repeat_interleave(times, 0))
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b)


def prefix_and_head() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(1)
    convs = nn.Conv2d(3, 5, 3, stride=2), nn.Conv2d(5, 7, 3)
    prefix = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU()).double()
    return prefix, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)).double()


def test_over_all_draws_the_gradient_is_that_of_all_samples() -> None:
    prefix, head = prefix_and_head()
    x, y = torch.randn(12, 3, 9, 9, dtype=torch.float64), torch.arange(12) % 4
    exact = torch.autograd.grad(F.cross_entropy(head(prefix(x)), y), list(prefix.parameters()))
    with torch.no_grad():
        output = prefix(x)
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(head(output), y), [output])
    starts = 400
    for i in range(starts):
        backpropagate(prefix, x, gradient, 3, (i + 0.5) / starts)
    for p, wanted in zip(prefix.parameters(), exact, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad / starts, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
    prefix.zero_grad()
    backpropagate(prefix, x, gradient, 12, 0.3)  # all of them
    for p, wanted in zip(prefix.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, wanted)


@pytest.fixture(scope="module")
def pictures() -> data.Data:
    flags: dict[str, Any] = {"train_size": 96, "test_size": 32, "channels_last": True}
    return data.load(config.resolve("glyphs", "small_vgg", "sgd", None, **flags))


def test_a_way_that_draws_all_pictures_is_sgd_and_one_that_draws_some_costs_less(pictures: data.Data) -> None:
    runs = {
        name: Run(way, 0, 4, 0.03, pictures, "small_vgg")
        for name, way in (("sgd", Way()), ("all", Way("jump", every=1, drawn=True)), ("some", Way("jump", every=4, drawn=True)))
    }
    x, y = next(iter(pictures.train(0)))
    x = x.double()
    costs = {}
    for name, ours in runs.items():
        ours.model.double().train()
        for step in range(2):
            costs[name] = ours._step(x, y, step, 0 if name == "sgd" else 5)
    for name, p in runs["sgd"].parameters.items():
        torch.testing.assert_close(runs["all"].parameters[name], p, rtol=1e-6, atol=1e-9)
        assert not torch.equal(runs["some"].parameters[name], p)
    prefix = runs["sgd"]._cost(0, x) - runs["sgd"]._cost(5, x)  # gradients of weights and activations
    assert runs["sgd"]._cost(5, x) < costs["some"] < costs["sgd"] < costs["all"]
    assert costs["all"] - costs["some"] == pytest.approx(3 / 4 * (costs["all"] - costs["sgd"] + prefix), rel=0.1)
