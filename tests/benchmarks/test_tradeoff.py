"""benchmarks/tradeoff.py: each way's steps against plain SGD, costs against what is counted layer by layer, tables from JSON alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import tradeoff
from benchmarks.tradeoff import Run, Way
from localsgd_ext.train import config, data

QUICK = ["--train-size", "64", "--test-size", "32", "--epochs", "4", "--seeds", "1"]


@pytest.fixture(scope="module")
def pictures() -> data.Data:
    flags: dict[str, Any] = {"train_size": 96, "test_size": 32, "channels_last": True}
    return data.load(config.resolve("glyphs", "small_vgg", "sgd", None, **flags))


def run(way: Way, pictures: data.Data, epochs: int = 4) -> Run:
    return Run(way, 0, epochs, 0.03, pictures, "small_vgg")


def test_boundaries() -> None:
    assert [Way("linear", l_max=0.5).boundary(epoch, 4, 16) for epoch in range(4)] == [0, 2, 4, 6]
    assert [Way("quadratic", l_max=0.5).boundary(epoch, 4, 16) for epoch in range(4)] == [0, 3, 6, 7]
    assert [Way("jump", l_max=0.5, start=0.5).boundary(epoch, 4, 16) for epoch in range(4)] == [0, 0, 8, 8]
    assert [Way("linear", l_max=1.0, start=0.5).boundary(epoch, 4, 16) for epoch in range(4)] == [0, 0, 0, 8]
    assert Way("jump", l_max=1.0).boundary(0, 4, 16) == 15  # something must learn in every step
    assert Way().boundary(3, 4, 16) == 0
    thawed = tradeoff.WAYS["frozen, jump at 1/4 to 60 %, thawed at 7/8"]
    assert [thawed.boundary(epoch, 8, 9) for epoch in range(8)] == [0, 0, 5, 5, 5, 5, 5, 0]


def test_cuts() -> None:
    assert [Way(every=4).cut(step, 6) for step in range(8)] == [6, 6, 6, 0] * 2
    assert [Way(every=4, nested=True).cut(step, 6) for step in range(8)] == [6, 3, 6, 0] * 2
    assert [Way().cut(step, 6) for step in range(3)] == [6] * 3


@pytest.mark.parametrize("epochs", [1.0, 0.5])
def test_sgd_is_torch_s_own(epochs: float, pictures: data.Data) -> None:
    ours = run(Way(epochs=epochs), pictures)
    model = copy.deepcopy(ours.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(4 * epochs))
    steps = 0
    for epoch in range(int(4 * epochs)):
        for x, y in pictures.train(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps += 1
        scheduler.step()
    row = ours.train()
    for theirs, mine in zip(model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    # Forward, gradient of the weight, and gradient of the input but for the first layer; no activations' sizes are assumed.
    whole = ours._costs[0, 0, 0]
    assert row["multiply_adds"] == steps * whole


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.parameters.items()}


def one_step(ours: Run, step: int, boundary: int) -> set[str]:
    """The parameters that it changed."""
    before = weights(ours)
    x, y = next(iter(ours.data.train(0)))
    ours.model.train()
    ours._step(x, y, step, boundary)
    return {name for name, p in ours.parameters.items() if not torch.equal(p, before[name])}


def test_in_between_the_prefix_stays_unless_its_gradient_is_held(pictures: data.Data) -> None:
    plain, held = run(Way(every=2), pictures), run(Way(every=2, held=True), pictures)
    prefix = set(plain.plan.prefix(plain.plan.parameters, 4))
    everything = set(plain.parameters)
    for ours in (plain, held):
        assert one_step(ours, 0, 4) == everything - prefix
        assert one_step(ours, 1, 4) == everything
    assert one_step(plain, 2, 4) == everything - prefix
    assert one_step(held, 2, 4) == everything
    held.optimizer.zero_grad(set_to_none=False)
    (first, *_) = held.prefix(4)
    gradient = held._held[first].clone()
    one_step(held, 4, 4)
    assert first.grad is not None
    assert torch.equal(first.grad, gradient)  # that of step 1, still


def test_larger_steps_are_larger_in_the_prefix_alone(pictures: data.Data) -> None:
    small, large = run(Way(every=3), pictures), run(Way(every=3, power=1.0), pictures)
    one_step(small, 2, 4)
    one_step(large, 2, 4)
    prefix = set(small.plan.prefix(small.plan.parameters, 4))
    for name in small.parameters:
        one, other = small.parameters[name].grad, large.parameters[name].grad
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other, 3 * one if name in prefix else one)


def small_network(*_: Any) -> nn.Sequential:
    torch.manual_seed(1)
    convs = nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False)
    norms = nn.BatchNorm2d(5), nn.BatchNorm2d(7)
    head = nn.Conv2d(7, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 26)
    return nn.Sequential(convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU(), *head)


@pytest.mark.parametrize(("power", "factor"), [(0.0, 1), (0.5, 2)])
def test_only_a_slice_of_the_pictures_reaches_the_prefix(
    power: float, factor: int, pictures: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps by hand in double precision: both parts one after the other, each normalised by itself, the second one a constant."""
    monkeypatch.setattr(tradeoff.models, "build", small_network)
    assert pictures.num_classes == 26
    ours = Run(Way(every=4, sliced=True, power=power), 0, 4, 0.03, pictures, "small_vgg")
    ours.model.train()
    prefix = ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias")
    theirs = {name: p.detach().double() for name, p in small_network().named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in theirs.items()}
    running = {norm: [torch.zeros(size).double(), torch.ones(size).double()] for norm, size in (("1", 5), ("4", 7))}

    def normalised(z: torch.Tensor, norm: str, p: dict[str, torch.Tensor]) -> torch.Tensor:
        mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
        of_samples = z.detach().mean((0, 2, 3)), z.detach().var((0, 2, 3), unbiased=True)
        running[norm] = [0.9 * before + 0.1 * now for before, now in zip(running[norm], of_samples, strict=True)]
        scaled = (z - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return scaled * p[f"{norm}.weight"][:, None, None] + p[f"{norm}.bias"][:, None, None]

    for step, (x, y) in enumerate(list(pictures.train(0))[:2]):
        assert len(x) == 32
        ours._step(x, y, step, boundary=2)

        p = {name: value.clone().requires_grad_() for name, value in theirs.items()}
        parts = []
        for part in (x[:8].double(), x[8:].double()):
            first = normalised(F.conv2d(part, p["0.weight"], stride=2), "1", p).relu()
            parts.append(normalised(F.conv2d(first, p["3.weight"], stride=2, padding=1), "4", p).relu())
        z = F.conv2d(torch.cat([parts[0], parts[1].detach()]), p["6.weight"], p["6.bias"]).mean((2, 3))
        logits = z @ p["9.weight"].T + p["9.bias"]
        loss = (logits.logsumexp(1) - logits[torch.arange(32), y]).mean()
        for name, gradient in zip(p, torch.autograd.grad(loss, list(p.values())), strict=True):
            scaled = factor * gradient if name in prefix else gradient
            velocity[name] = 0.9 * velocity[name] + scaled + 5e-4 * theirs[name]
            theirs[name] = theirs[name] - 0.03 * velocity[name]

    for name, mine in ours.model.named_parameters():
        torch.testing.assert_close(
            mine.double(), theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, statistics in running.items():
        norm = ours.model.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        for mine, expected in zip((norm.running_mean, norm.running_var), statistics, strict=True):
            assert mine is not None
            torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_slice_costs_its_share_and_only_whole_modules_are_sliced(pictures: data.Data) -> None:
    ours = Run(Way(every=4, sliced=True), 0, 4, 0.03, pictures, "small_resnet")
    assert [ours._whole_modules(boundary) for boundary in (0, 1, 2, 3, 13)] == [(0, 0), (1, 1), (1, 1), (2, 3), (9, 13)]
    x, y = next(iter(pictures.train(0)))
    whole, frozen = ours._cost(0, x), ours._cost(3, x)
    assert frozen < whole
    assert ours._step(x, y, 0, 4) == frozen + (whole - frozen) / 4
    assert ours._step(x, y, 0, 0) == whole
    assert one_step(ours, 0, 4) == set(ours.parameters)


def test_layers_enter_the_prefix_with_their_average(pictures: data.Data) -> None:
    ours = run(Way(averaged=True), pictures)
    one_step(ours, 0, 0)
    expected = {name: ours._average[p].clone() for name, p in ours.parameters.items()}
    last = weights(ours)
    ours._enter_averaged(2, 4)
    entered = set(ours.plan.prefix(ours.plan.parameters, 4)) - set(ours.plan.prefix(ours.plan.parameters, 2))
    for name, p in ours.parameters.items():
        assert torch.equal(p, expected[name] if name in entered else last[name])


def test_an_annealed_layer_s_rate_is_zero_when_it_enters(pictures: data.Data) -> None:
    ours = run(Way("linear", annealed=True), pictures)
    rates = []
    for epoch in (0.0, 0.5, 1.0, 2.0):
        ours._set_lr(epoch)
        rates.append([group["lr"] for group in ours.optimizer.param_groups])
    assert rates[0] == [0.03] * len(rates[0])
    assert rates[1][0] == pytest.approx(0.015)  # half-way to epoch 1, in which the first two layers enter
    assert rates[2][0] == 0
    assert rates[3][1] == 0
    assert rates[3][-1] == pytest.approx(0.015)  # the last layer never enters: the run's cosine


def test_the_other_layers_rate_grows_with_the_prefix(pictures: data.Data) -> None:
    ours, plain = run(Way("linear", l_max=0.75, hotter=True), pictures), run(Way("linear", l_max=0.75), pictures)
    layers = len(ours.plan)
    for epoch in range(4):
        ours._set_lr(epoch + 0.5)
        plain._set_lr(epoch + 0.5)
        left = layers - ours.boundary(epoch)
        expected = plain.optimizer.param_groups[-1]["lr"] * (layers / left) ** 0.5
        assert ours.optimizer.param_groups[-1]["lr"] == pytest.approx(expected)
    assert left < layers


def test_runs_end_to_end_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    command = [
        *QUICK,
        "--model",
        "small_vgg",
        "--ways",
        "SGD;SGD, 0.75 of the epochs;1/4 and 1/8, quadratic",
        "--out",
        str(out),
    ]
    assert tradeoff.main([*command, "--budget", "0"]) == 3
    assert tradeoff.main(command) == 2  # the file exists
    assert tradeoff.main([*command, "--resume", "--epochs", "5"]) == 2
    assert "is of other options" in capsys.readouterr().err
    assert tradeoff.main([*command, "--resume"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows.values()] == ["SGD", "SGD, 0.75 of the epochs", "1/4 and 1/8, quadratic"]
    assert rows["SGD, 0.75 of the epochs|0"]["multiply_adds"] == 0.75 * rows["SGD|0"]["multiply_adds"]
    assert "| SGD, 0.75 of the epochs |" in printed
    assert "75.0 |" in printed
    assert tradeoff.main(["--table", str(out)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("options", [["--ways", "magic"], ["--resume"], ["--epochs", "0"]])
def test_wrong_arguments(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tradeoff.main(options)
    assert ended.value.code == 2
