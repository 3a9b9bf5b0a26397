"""benchmarks/tradeoff_gates.py: when a prefix learns, by what forward passes alone tell; and when that is due more and more rarely."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tradeoff import Run, Way
from benchmarks.tradeoff_gates import WINDOW, Drift, LossGate
from localsgd_ext.train import config, data


@pytest.fixture(scope="module")
def pictures() -> data.Data:
    flags: dict[str, Any] = {"train_size": 96, "test_size": 32, "channels_last": True}
    return data.load(config.resolve("glyphs", "small_vgg", "sgd", None, **flags))


def run(way: Way, pictures: data.Data) -> Run:
    return Run(way, 0, 4, 0.03, pictures, "small_vgg")


def test_the_gate_opens_for_the_highest_losses() -> None:
    gate = LossGate(4)
    assert [gate.opens(loss) for loss in (1.0, 0.5, 0.9, 1.1, 1.05, 0.2)] == [True, False, False, True, True, False]
    generator = torch.Generator().manual_seed(0)
    opened = [gate.opens(loss) for loss in torch.rand(4000, generator=generator).tolist()]
    assert sum(opened) == pytest.approx(1000, rel=0.1)
    gate = LossGate(2)
    assert [gate.opens(float(WINDOW - i)) for i in range(WINDOW)] == [i == 0 for i in range(WINDOW)]
    assert not any(gate.opens(-1.0 - i) for i in range(WINDOW - 1))
    assert gate.opens(0.5)  # the highest by now: what was above it has left the window


def test_a_step_whose_gate_is_closed_is_that_of_a_frozen_prefix(pictures: data.Data) -> None:
    gated, frozen, sgd = run(Way(every=4, by_loss=True), pictures), run(Way(), pictures), run(Way(), pictures)
    x, y = next(iter(pictures.train(0)))
    for ours in (gated, frozen, sgd):
        ours.model.train()
    assert gated._gate is not None
    for opens, other, boundary in ((False, frozen, 4), (True, sgd, 0)):
        gated._gate.opens = lambda loss, opens=opens: opens  # type: ignore[method-assign]
        other.model.load_state_dict(gated.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(gated.optimizer.state_dict()))
        assert gated._step(x, y, 0, 4) == other._step(x, y, 0, boundary)
        for mine, theirs in zip(gated.model.state_dict().values(), other.model.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_outputs_that_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(8, 6)
    drift = Drift(model, ["0", "2", "4"], x, 0.1)
    model.train()
    running = copy.deepcopy(model.state_dict())
    assert drift.end_epoch() == 0  # there is nothing to compare with
    assert drift.end_epoch() == 3
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, running[name])

    def changed(index: int, share: float) -> int:
        """Of a new network, layer ``index`` of which then puts out that share more."""
        drift = Drift(model, ["0", "2", "4"], x, 0.1)
        drift.end_epoch()
        layer = model[index]
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight *= 1 + share
            layer.bias *= 1 + share
        return drift.end_epoch()

    assert changed(4, 0.09) == 3
    assert changed(4, 0.11) == 2
    assert changed(0, 0.11) == 0
    assert changed(2, float("nan")) == 1


def test_what_was_still_stays_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    drift = Drift(model, ["0"], torch.randn(4, 3), 0.1)
    drift.end_epoch()
    assert drift.end_epoch() == 1
    nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
    assert drift.end_epoch() == 1


def test_a_run_freezes_what_stands_still(pictures: data.Data) -> None:
    still, moving, sgd = (run(way, pictures) for way in (Way("drift", drift=1e9), Way("drift", drift=0.0), Way()))
    costs = [ours.train()["multiply_adds"] for ours in (still, moving, sgd)]
    x = next(iter(pictures.train(0)))[0]
    assert still.boundary(3) == 8 == int(0.9 * len(still.plan))
    assert moving.boundary(3) == 0
    forward = costs[1] - costs[2]
    assert forward == 4 * sum(macs(sgd.model, x))
    assert costs[0] < costs[2]


def macs(model: nn.Module, x: Tensor) -> list[float]:
    """Of every layer, for its output."""
    found: list[float] = []
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, z: found.append(z.numel() * m.weight[0].numel()))
    model(x)
    return found


def test_refreshes_become_rarer_with_the_learning_rate(pictures: data.Data) -> None:
    ours = run(Way(every=2, rarer=True), pictures)

    def due(lr: float, boundary: int = 4) -> list[int]:
        for group in ours.optimizer.param_groups:
            group["lr"] = lr
        return [int(ours._falls_due(boundary)) for _ in range(8)]

    assert due(0.03) == [0, 1, 0, 1, 0, 1, 0, 1]
    assert due(0.015) == [0, 0, 0, 1, 0, 0, 0, 1]
    assert due(0.03, boundary=0) == [0] * 8  # all layers learn anyway
    assert due(0.0) == [0] * 8
    assert not any(run(Way(every=2), pictures)._falls_due(4) for _ in range(8))
    x, y = next(iter(pictures.train(0)))
    whole, frozen = ours._cost(0, x), ours._cost(4, x)
    for group in ours.optimizer.param_groups:
        group["lr"] = 0.03
    assert [ours._step(x, y, step, 4) for step in range(4)] == [frozen, whole, frozen, whole]
