"""benchmarks/tradeoff_local.py: local steps between those that learn, and what takes them back."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tradeoff import Run, Way
from benchmarks.tradeoff_local import LocalPrefix
from localsgd_ext.train import config, data


@pytest.fixture(scope="module")
def pictures() -> data.Data:
    flags: dict[str, Any] = {"train_size": 96, "test_size": 32, "channels_last": True}
    return data.load(config.resolve("glyphs", "small_vgg", "sgd", None, **flags))


def test_between_two_steps_that_learn_the_prefix_makes_one_of_the_rule_s_length(pictures: data.Data) -> None:
    lr = 2.0**-6
    ours = Run(Way("linear", every=2, rule="hebb", rule_lr=lr), 0, 4, 0.03, pictures, "small_vgg")
    plain = Run(Way("linear", every=2), 0, 4, 0.03, pictures, "small_vgg")
    x, y = next(iter(pictures.train(0)))
    boundary = 4
    assert ours._local is not None
    ours._local.begin_epoch(ours.plan.layers[:boundary])
    names = [f"{layer}.weight" for layer in ours.plan.layers[:boundary]]
    macs = ours._cost(boundary, x, 0, ours.plan.layers[:boundary]) - ours._cost(boundary, x)
    for model in (ours.model, plain.model):
        model.train()
    for step in range(4):
        before = {name: p.detach().clone() for name, p in ours.parameters.items()}
        plain.model.load_state_dict(ours.model.state_dict())
        plain.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
        cost, expected = ours._step(x, y, step, boundary), plain._step(x, y, step, boundary)
        if step % 2:  # the whole network learns, and nothing else happens
            assert cost == expected
            for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)
            continue
        assert cost == expected + macs
        for name in names:
            assert float((ours.parameters[name] - before[name]).norm()) == pytest.approx(lr, rel=1e-3)
            assert torch.equal(plain.parameters[name], before[name])
    # One product more for each of them, as large as its output's.
    assert macs == ours._forward_cost(x) - sum_behind(ours, x, boundary)


def sum_behind(ours: Run, x: Tensor, boundary: int) -> float:
    """Multiply-adds of the forward pass of the layers behind the prefix."""
    found: list[float] = []
    handles = [
        ours.model.get_submodule(layer).register_forward_hook(
            lambda m, _, z: found.append(z.numel() * m.get_parameter("weight")[0].numel())
        )
        for layer in ours.plan.layers[boundary:]
    ]
    with torch.no_grad():
        ours.model(x)
    for handle in handles:
        handle.remove()
    return sum(found)


class Local:
    """A prefix of one layer, moved by steps of length 1 until its loss rises."""

    def __init__(self, supervision: str) -> None:
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3, bias=False)
        self.model = nn.Sequential(self.layer, nn.Conv2d(4, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 2))
        self.prefix = LocalPrefix(self.model, ["0", "1", "3"], "hebb", 1.0, supervision)

    def epoch(self, loss: float, prefix: tuple[str, ...] = ("0",)) -> tuple[list[str], Tensor]:
        self.prefix.begin_epoch(prefix)
        layers = self.prefix.begin_step(True)
        self.model(torch.ones(2, 3, 6, 6))
        within = self.layer.weight.detach().clone()
        self.prefix.end_epoch(loss)
        return layers, within


def test_an_epoch_whose_loss_rose_is_taken_back() -> None:
    local = Local("revert")
    start = local.layer.weight.detach().clone()
    assert local.epoch(2.0)[0] == ["0"]
    good = local.layer.weight.detach().clone()
    assert float((good - start).norm()) == pytest.approx(1, rel=1e-5)
    _, within = local.epoch(2.5)
    assert not torch.equal(within, good)
    assert torch.equal(local.layer.weight, good)
    layers, within = local.epoch(2.6)  # rose again, but the layer stood still: nothing to take back
    assert layers == []
    assert torch.equal(within, good)
    layers, within = local.epoch(2.6)  # did not rise
    assert layers == ["0"]
    assert torch.equal(local.layer.weight, within)
    _, within = local.epoch(float("nan"))
    assert not torch.equal(local.layer.weight, within)


def test_a_sign_steps_back() -> None:
    local = Local("sign")
    start = local.layer.weight.detach().clone()
    for loss in (2.0, 3.0):
        local.epoch(loss)
    two = local.layer.weight.detach().clone()
    assert float((two - start).norm()) == pytest.approx(2, rel=0.05)
    local.epoch(3.0)
    assert float((local.layer.weight.detach() - start).norm()) == pytest.approx(1, rel=0.1)


def test_a_run_goes_by_its_mean_losses(pictures: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of epochs with the mean losses 3, 2, 2.5, 2: after the third one the prefix stands still, and its weights are the second's."""
    ours = Run(Way("jump", l_max=0.5, rule="hebb", rule_lr=0.01, supervision="revert"), 0, 5, 0.03, pictures, "small_vgg")
    steps, layers, weights = ours.data.steps, len(ours.plan), []
    means = [3.0, 2.0, 2.5, 2.0, 1.0]
    step = Run._step

    def scripted(self: Run, x: Tensor, y: Tensor, index: int, boundary: int, begin: int = 0) -> float:
        if index % steps == 0:
            weights.append(self.parameters["0.weight"].detach().clone())
        cost = step(self, x, y, index, boundary, begin)
        self._loss = means[index // steps] + (index % steps - (steps - 1) / 2)
        return cost

    monkeypatch.setattr(Run, "_step", scripted)
    total = ours.train()["multiply_adds"]
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, False, True, True]
    x = next(iter(pictures.train(0)))[0]
    half = layers // 2
    assert total == steps * (4 * ours._cost(half, x, 0, ours.plan.layers[:half]) + ours._cost(half, x))


def test_linear_layers_and_layers_behind_the_prefix_stay() -> None:
    local = Local("")
    before = {name: p.detach().clone() for name, p in local.model.named_parameters()}
    assert local.epoch(1.0, ("0", "3"))[0] == ["0"]
    changed = [name for name, p in local.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["0.weight"]
    local.prefix.begin_epoch(("0",))
    assert local.prefix.begin_step(False) == []
    before = {name: p.detach().clone() for name, p in local.model.named_parameters()}
    local.model(torch.ones(2, 3, 6, 6))
    assert all(torch.equal(p, before[name]) for name, p in local.model.named_parameters())


def test_wrong_supervision() -> None:
    with pytest.raises(ValueError, match="supervision must be one of"):
        Local("hope")
