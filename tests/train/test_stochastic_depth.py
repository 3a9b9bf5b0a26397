"""Stochastic depth against residual blocks written out, which compute every branch and multiply it by 0 or 1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from localsgd_ext.train import data, models
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.measure import multiply_adds
from localsgd_ext.train.stochastic_depth import ResidualBranches

BLOCKS = {"small_resnet": 6, "resnet18": 8, "resnet34": 16, "resnet50": 16, "mobilenet_v2": 10}


class Written(nn.Module):
    """A residual block written out: its branch times 0 or 1 in training, times the survival probability at test time."""

    def __init__(self, block: Any, survival: float) -> None:
        super().__init__()
        self.block, self.survival = block, survival

    def scale(self) -> Tensor:
        if not self.training:
            return torch.tensor(self.survival)
        return torch.empty(1).bernoulli_(self.survival)

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        if isinstance(b, InvertedResidual):
            return b.conv(x) * self.scale() + x
        y = F.relu(b.bn1(b.conv1(x)))
        y = b.bn2(b.conv2(y))
        if isinstance(b, Bottleneck):
            y = b.bn3(b.conv3(F.relu(y)))
        if isinstance(b, (BasicBlock, Bottleneck)):
            shortcut = x if b.downsample is None else b.downsample(x)
        else:
            shortcut = F.pad(
                x[:, :, :: b.conv1.stride[0], :: b.conv1.stride[1]], (0, 0, 0, 0, 0, b.conv1.out_channels - b.conv1.in_channels)
            )
        return F.relu(y * self.scale() + shortcut)


def written(model: nn.Module, survivals: list[float]) -> nn.Module:
    """A copy of ``model`` with its residual blocks replaced."""
    model = copy.deepcopy(model)
    rest = iter(survivals)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kinds = (models.BasicBlock, BasicBlock, Bottleneck)
            if isinstance(child, kinds) or (isinstance(child, InvertedResidual) and child.use_res_connect):
                setattr(parent, name, Written(child, next(rest)))
    assert next(rest, None) is None
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_after_some_steps_are_those_of_blocks_written_out(name: str) -> None:
    """Bit for bit, with momentum and weight decay, which go on moving the branches that are left out."""
    model = models.build(name, 5, seed=0)
    number = BLOCKS[name]
    reference = written(model, [1 - place / number * (1 - 0.4) for place in range(1, number + 1)])
    branches = ResidualBranches(model, survival=0.4)
    assert len(branches.blocks) == number
    size = 16 if name == "small_resnet" else 32
    x, y = torch.randn(6, 4, 3, size, size), torch.arange(4)
    for network in (model, reference):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
        for batch in x:
            optimizer.zero_grad()
            F.cross_entropy(network(batch), y).backward()
            if network is model:
                branches.fill_gradients()
            optimizer.step()
    assert branches.dropped
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", BLOCKS)
def test_at_test_time_branches_are_scaled_and_folded_that_is_the_plain_network(name: str) -> None:
    """Also its parameters' names: the trained weights load into it."""
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    unscaled = models.build(name, 5, seed=3).double()
    for module in unscaled.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    unscaled.train()(x)  # running statistics with which the signal does not die away
    model = copy.deepcopy(unscaled.eval())
    number = BLOCKS[name]
    reference = written(model, [1 - place / number * 0.5 for place in range(1, number + 1)]).eval()
    branches = ResidualBranches(model, survival=0.5)
    plain = models.build(name, 5, seed=4).double().eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        branches.fold_()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(unscaled(x), expected, rtol=1e-2, atol=1e-3)


def test_the_weights_of_a_finished_run_give_its_accuracy(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    made = trainer(tiny("stochastic-depth"))
    while not made.done:
        made.run_epoch()
    made.finish()
    plain = models.build("small_resnet", 10, seed=1)
    plain.load_state_dict(torch.load(made.directory.path / "model.pt", weights_only=True))
    made.model, made.dropped = plain, None
    accuracy, loss = made.evaluate()
    assert (accuracy, loss) == (made.metrics[-1]["test_accuracy"], pytest.approx(made.metrics[-1]["test_loss"], rel=1e-4))


def test_a_branch_left_out_is_not_computed() -> None:
    model = models.build("small_resnet", 5, seed=0).train()
    branches = ResidualBranches(model, survival=0.5)
    called: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, a, z, name=name: called.append(name))
    kept = 0
    for _ in range(400):
        called.clear()
        branches.dropped.clear()
        model(torch.randn(2, 3, 8, 8))
        expected = [f"{b}.{c}" for b in branches.blocks if b not in branches.dropped for c in ("conv1", "conv2")]
        assert called == ["0.0", *expected]
        kept += "6" not in branches.dropped
    assert 0.4 < kept / 400 < 0.6  # the last block's survival is 0.5: 4 standard deviations


def test_first_weights_data_and_schedule_are_those_of_sgd(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    sgd, dropping = trainer(tiny("sgd"), "sgd"), trainer(tiny("stochastic-depth"), "dropping")
    theirs, mine = sgd.model.state_dict(), dropping.model.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    # With every branch kept it is SGD, bit for bit.
    keeping = trainer(tiny("stochastic-depth", survival=1.0), "keeping")
    for made in (sgd, keeping, dropping):
        made.run_epoch()
    same = ("train_loss", "test_loss", "test_accuracy", "lr", "multiply_adds", "saved_activation_bytes")
    assert {name: keeping.metrics[0][name] for name in same} == {name: sgd.metrics[0][name] for name in same}
    assert dropping.metrics[0]["train_loss"] != sgd.metrics[0]["train_loss"]


def test_multiply_adds_are_those_of_all_steps(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    made = trainer(tiny("stochastic-depth", train_size=480, survival=0.5))
    counted = 0.0
    forward = made._forward

    def counting(x: Tensor, y: Tensor) -> Tensor:
        nonlocal counted
        with multiply_adds(made.model) as step:
            loss = forward(x, y)
        counted += step.total
        return loss

    made._forward = counting  # type: ignore[method-assign]
    entry = made.run_epoch()
    assert entry["multiply_adds"] == pytest.approx(counted, rel=1e-12)
    # The expected number: the whole network's less the branches' times their probability of being left out, 30 steps.
    assert made.dropped is not None
    branches, (_, whole) = made.dropped.branches, made.dropped.whole
    layers = whole.by_layer
    blocks = list(branches.blocks)
    drop = {block: (number + 1) / len(blocks) * 0.5 for number, block in enumerate(blocks)}
    expected = sum(n * (1 - drop.get(branches.block_of(layer) or "", 0.0)) for layer, n in layers.items())
    assert entry["multiply_adds"] / 30 == pytest.approx(expected, rel=0.15)
    assert expected < 0.75 * whole.total


def test_projections_belong_to_no_branch() -> None:
    branches = ResidualBranches(models.build("resnet18", 10, seed=0), 0.5)
    assert branches.block_of("layer2.0.downsample.0") is None
    assert branches.block_of("layer2.0.conv1") == "layer2.0"
    assert branches.block_of("conv1") is None


@pytest.mark.parametrize("model", ["small_vgg", "vgg13", "timm:resnet10t"])
def test_networks_without_residual_blocks(model: str, tiny: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ValueError, match=f"--method stochastic-depth needs a network with residual blocks: .*got --model {model}"
    ):
        tiny("stochastic-depth").replace(model=model)
    if not model.startswith("timm:"):
        with pytest.raises(ValueError, match=r"needs residual blocks of a known kind, S.* has none"):
            ResidualBranches(models.build(model, 10, seed=0), 0.5)


def test_every_network_is_known() -> None:
    assert set(models.RESIDUAL) == BLOCKS.keys() == models.MODELS.keys() - {"small_vgg", "vgg13"}


def test_data_of_two_methods_is_the_same(tiny: Callable[..., RunConfig]) -> None:
    one, other = (data.load(tiny(method)).train(1) for method in ("sgd", "stochastic-depth"))
    for (x, y), (u, v) in zip(one, other, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
