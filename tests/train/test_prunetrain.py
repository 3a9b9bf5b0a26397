"""PruneTrain: the lasso against sums written out, channels that are empty and the networks without them, stopping and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsgd_ext.train import checkpoint, models, prunetrain
from localsgd_ext.train.config import RunConfig, resolve
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.prunetrain import GroupLasso

SIZES = {"small_resnet": 16, "small_vgg": 16, "resnet18": 16, "vgg13": 32, "resnet34": 32, "resnet50": 32, "mobilenet_v2": 32}


def small_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )


def norm(weight: Tensor) -> Tensor:
    return (weight.square().sum() + 1e-8).sqrt()


def written_out(model: nn.Sequential) -> Tensor:
    stem, pointwise, classifier = model[0].weight, model[2].weight, model[6].weight
    assert isinstance(stem, Tensor)
    assert isinstance(pointwise, Tensor)
    assert isinstance(classifier, Tensor)
    groups = [stem[k] for k in range(4)]  # not its inputs: those are the colours
    groups += [pointwise[k] for k in range(5)] + [pointwise[:, c] for c in range(4)]
    groups += [classifier[:, c] for c in range(5)]  # not its outputs: those are the classes; the depthwise layer not at all
    return torch.stack([norm(group) for group in groups]).sum()


def test_the_lasso_is_the_sum_written_out_and_so_is_its_gradient() -> None:
    model = small_chain()
    with torch.no_grad():
        model[2].weight[1] = 0  # type: ignore[index, operator]
        model[2].weight[:, 2] = 0  # type: ignore[index, operator]
    lasso = GroupLasso(model, ratio=0.2)
    expected = written_out(model)
    assert lasso.value() == pytest.approx(expected.item(), rel=1e-6)
    (1.5 * expected).backward()
    theirs = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    lasso.coefficient = 1.5
    lasso.add_gradient_()
    for parameter, gradient in zip(model.parameters(), theirs, strict=True):
        assert parameter.grad is not None
        added = parameter.grad - 1
        torch.testing.assert_close(added, torch.zeros_like(added) if gradient is None else gradient, rtol=1e-5, atol=1e-5)


def test_the_coefficient_gives_the_lasso_its_share() -> None:
    lasso = GroupLasso(models.build("small_resnet", 10, seed=0), ratio=0.2)
    lasso.set_coefficient(2.5)
    assert lasso.coefficient is not None
    assert lasso.coefficient * lasso.value() / (2.5 + lasso.coefficient * lasso.value()) == pytest.approx(0.2)


def test_the_coefficient_is_that_of_the_first_iteration(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    made = trainer(tiny("prunetrain", lasso_ratio=0.2))
    assert made.lasso is not None
    start = GroupLasso(models.build("small_resnet", 10, seed=0), 0.2).value()
    x, y = next(iter(made.data.train(0)))
    loss = F.cross_entropy(models.build("small_resnet", 10, seed=0).train()(x), y).item()
    made.run_epoch()
    assert made.lasso.coefficient == pytest.approx(0.2 / 0.8 * loss / start, rel=1e-6)


def at_random(name: str) -> nn.Module:
    """A network as if trained for a while: no two channels alike, biases and running statistics that matter."""
    torch.manual_seed(1)
    model = models.build(name, 7, seed=0).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def empty(model: nn.Module, makers: list[str], readers: list[str], channels: list[int]) -> None:
    """Make ``channels`` that ``makers`` make and ``readers`` read empty, as far as the lasso would: nearly."""
    for name in makers:
        model.get_submodule(name).weight.data[channels] = 5e-5  # type: ignore[index, operator]
    for name in readers:
        model.get_submodule(name).weight.data[:, channels] = 5e-5 if name != "classifier.1" else 0  # type: ignore[index, operator]


# network: (layers that make the channels, layers that read them, channels); all that a shortcut joins must be there
EMPTY = {
    "small_resnet": [
        (["3.conv1"], ["3.conv2"], [0, 5, 31]),
        (["5.conv1"], ["5.conv2"], [7]),
        # one channel of all stages, one that begins in the second, two that begin in the third
        (
            ["0.0", *(f"{block}.conv2" for block in range(1, 7))],
            [*(f"{block}.conv1" for block in range(1, 7)), "9"],
            [3],
        ),
        ([f"{block}.conv2" for block in range(3, 7)], [*(f"{block}.conv1" for block in range(4, 7)), "9"], [20]),
        (["5.conv2", "6.conv2"], ["6.conv1", "9"], [40, 63]),
    ],
    "small_vgg": [(["0"], ["3"], [1, 2]), (["24"], ["29"], [0, 127])],
    "resnet18": [
        (["layer2.0.conv1"], ["layer2.0.conv2"], [3, 4]),
        (
            ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"],
            ["layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0"],
            [9],
        ),
    ],
    "vgg13": [(["0.0"], ["0.3"], [5]), (["0.31"], ["3"], [1, 100, 511])],
    "resnet34": [(["layer4.2.conv1"], ["layer4.2.conv2"], [0, 511])],
    "resnet50": [(["layer1.0.conv2"], ["layer1.0.conv3"], [2]), (["layer4.2.conv1"], ["layer4.2.conv2"], [17])],
    "mobilenet_v2": [(["features.3.conv.0.0"], ["features.3.conv.2"], [0, 77]), (["features.18.0"], ["classifier.1"], [1279])],
}


@pytest.mark.parametrize("name", EMPTY)
def test_exactly_the_empty_channels_go_and_the_outputs_stay(name: str) -> None:
    model = at_random(name)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    expected_shapes = {key: list(shape) for key, shape in shapes(model).items()}
    for makers, readers, channels in EMPTY[name]:
        empty(model, makers, readers, channels)
        for maker in makers:
            expected_shapes[f"{maker}.weight"][0] -= len(channels)
        for reader in readers:
            expected_shapes[f"{reader}.weight"][1] -= len(channels)
    with torch.no_grad():
        before = model(x)
    assert torch.isfinite(before).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    removed = prunetrain.reconfigure(model, optimizer, x[:1])
    assert removed == sum(len(channels) for _, _, channels in EMPTY[name])
    got = {key: list(shape) for key, shape in shapes(model).items() if len(shape) > 1 and shape[1:] != (1, 3, 3)}
    assert got == {key: expected_shapes[key] for key in got}
    with torch.no_grad():
        after = model.eval()(x)
    # What is removed had weights of 5e-5, and is not read; a wrong channel would be worth a hundred times more.
    assert (after - before).abs().max() < 2e-3 * before.abs().max()
    # It trains, and its weights load into a fresh network of the same name.
    F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    fresh = models.build(name, 7, seed=9)
    prunetrain.load(fresh, model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert prunetrain.reconfigure(model, optimizer, x[:1]) == 0


def test_every_network_is_tested() -> None:
    assert EMPTY.keys() == models.MODELS.keys() == set(models.PRUNABLE)


@pytest.mark.parametrize("spared", ["maker", "reader", "other maker"])
def test_a_channel_stays_while_anything_makes_or_reads_it(spared: str) -> None:
    model = at_random("small_resnet")
    makers, readers = ["5.conv2", "6.conv2"], ["6.conv1", "9"]
    if spared == "maker":
        makers.pop()
    elif spared == "other maker":
        makers.pop(0)
    else:
        readers.pop()
    empty(model, makers, readers, [50])
    before = shapes(model)
    assert prunetrain.reconfigure(model, torch.optim.SGD(model.parameters()), torch.zeros(1, 3, 16, 16)) == 0
    assert shapes(model) == before


def test_a_layer_keeps_a_channel() -> None:
    model = at_random("small_vgg")
    empty(model, ["3"], ["7"], list(range(16)))
    model.get_submodule("3").weight.data[11, 0, 0, 0] = 9e-5  # type: ignore[index, operator]
    kept = model.get_submodule("4").bias[11].clone()  # type: ignore[index, operator]
    assert prunetrain.reconfigure(model, torch.optim.SGD(model.parameters()), torch.zeros(1, 3, 16, 16)) == 15
    assert torch.equal(model.get_submodule("4").bias.detach(), kept.reshape(1))  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_momentum_goes_on_with_the_channels_that_stay(layout: torch.memory_format) -> None:
    model = at_random("small_resnet").to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), torch.arange(4)).backward()
        optimizer.step()
    empty(model, ["1.conv1"], ["1.conv2"], [2, 9])
    before = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    assert prunetrain.reconfigure(model, optimizer, x[:1], layout) == 2
    keep = [c for c in range(16) if c not in (2, 9)]
    expected = dict(before)
    for name in ("1.conv1.weight", "1.bn1.weight", "1.bn1.bias"):
        expected[name] = before[name][keep]
    expected["1.conv2.weight"] = before["1.conv2.weight"][:, keep]
    after = dict(model.named_parameters())
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in after.values()]
    assert set(optimizer.state) == set(after.values())
    for name, parameter in after.items():
        buffer = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(buffer, expected[name]), name
        assert parameter.grad is None
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=layout)
            assert buffer.is_contiguous(memory_format=layout)


PRUNING = {
    "lasso_ratio": 0.99,
    "reconfigure_every": 2,
    "lr_schedule": "constant",
    "momentum": 0.5,
    "epochs": 5,
    "train_size": 192,
}
"""A lasso strong enough to empty channels in a few steps, if ``empty`` means less than 0.03."""


@pytest.mark.parametrize("channels_last", [False, True])
def test_resuming_after_a_reconfiguration(
    channels_last: bool,
    tmp_path: Path,
    tiny: Callable[..., RunConfig],
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After every epoch; and with the checkpoint before the last, when the last is damaged."""
    monkeypatch.setattr(prunetrain, "THRESHOLD", 0.03)
    config = tiny("prunetrain", **PRUNING, channels_last=channels_last)
    straight = trainer(config, "straight")
    while not straight.done:
        straight.run_epoch()
    straight.finish()
    assert straight.metrics[1]["parameters"] > straight.metrics[2]["parameters"] > straight.metrics[4]["parameters"]
    assert straight.metrics[2]["multiply_adds"] < straight.metrics[1]["multiply_adds"]

    trainer(config, "stopped").run_epoch()
    for _ in (2, 3, 4, 5):
        going_on = trainer(config, "stopped", resume=True)
        going_on.run_epoch()
    newest = checkpoint.path_of(tmp_path / "stopped", 5)
    newest.write_bytes(newest.read_bytes()[:-100])
    again = trainer(config, "stopped", resume=True)
    assert again.epoch == 4
    again.run_epoch()
    again.finish()
    one, other = (torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("straight", "stopped"))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    timed = {"train_seconds", "elapsed_train_seconds", "images_per_second", "step_ms"}
    metrics = [
        [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (tmp_path / run / "metrics.jsonl").open()]
        for run in ("straight", "stopped")
    ]
    assert metrics[0] == metrics[1]
    # model.pt is loaded as the README says.
    model = models.build("small_resnet", 10, seed=0)
    prunetrain.load(model, one)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), straight.model.eval()(x), rtol=1e-5, atol=1e-5)


def test_first_weights_and_data_are_those_of_sgd(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    """With hardly any lasso, and nothing to remove, it is SGD."""
    sgd, pruning = trainer(tiny("sgd"), "sgd"), trainer(tiny("prunetrain", lasso_ratio=1e-12, reconfigure_every=1), "pruning")
    theirs, mine = sgd.model.state_dict(), pruning.model.state_dict()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    for made in (sgd, pruning):
        for _ in range(2):
            made.run_epoch()
    assert pruning.metrics[1]["train_loss"] == pytest.approx(sgd.metrics[1]["train_loss"], rel=1e-5)
    assert pruning.metrics[1]["lr"] == sgd.metrics[1]["lr"]
    assert "reconfigured: 0 channels removed" in (pruning.directory.path / "log.txt").read_text()


def test_reconfigurations_are_a_ninth_of_the_run_apart() -> None:
    every = [resolve("fake", "small_resnet", "prunetrain", epochs=n).reconfigure_every for n in (1, 8, 10, 90, 180)]
    assert every == [1, 1, 1, 10, 20]
    assert resolve("fake", "small_resnet", "prunetrain", epochs=90, reconfigure_every=5).reconfigure_every == 5


def test_an_unknown_network(tiny: Callable[..., RunConfig]) -> None:
    with pytest.raises(
        ValueError, match=r"--method prunetrain needs one of the networks small_resnet, .*got --model timm:resnet10t"
    ):
        tiny("prunetrain").replace(model="timm:resnet10t")


def test_a_state_dict_of_another_network() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        prunetrain.load(models.build("small_vgg", 10, seed=0), models.build("small_resnet", 10, seed=0).state_dict())
