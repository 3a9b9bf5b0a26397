"""The training library against the straight-line re-implementation, epoch by epoch, in float64."""

import pytest
import torch
from models import TwoBlockResNet, batches, run_epoch, seeded
from straight_line import LAYERS, StraightLine

from localsgd_ext import LocalizedLearning, ops

EPOCHS = 12  # K = floor(12 * 1 / (0.75 * 7)) = 2 at t_shift 1: at most a move in three epochs
SPOILED = (3, 7, 9)  # epochs with other labels, so that the loss rises
RESTARTS = (4, 5)  # epochs with a larger learning rate, so that the norm of the update rises

VARIANTS = {
    "small lr": ({"lr": 1e-4}, {}),
    "larger lr": ({"lr": 0.003}, {"local_lr": 0.003}),
    "channels_last": ({"lr": 0.003}, {"local_lr": 0.003}),
    "paper": ({}, {"local_lr": 0.01}),
    "frozen": ({"rule": "frozen", "supervision": "absolute"}, {"rule": "frozen", "local_lr": 0.01}),
    "momentum": ({"lr": 0.003, "momentum": 0.9}, {"local_lr": 0.003, "local_momentum": 0.9}),
    "un-normalised": ({"lr": 1e-6, "normalize": False}, {"local_lr": 1e-6, "normalize": False}),
    "post-activation": ({"lr": 0.003, "activation": torch.relu}, {"local_lr": 0.003, "activation": torch.relu}),
    "lr decay": (
        {"lr": 0.01, "lr_decay": 10, "lr_decay_every": 3},
        {"local_lr": 0.01, "lr_decay": 10, "lr_decay_every": 3},
    ),
    "lr callable": ({"lr": lambda epoch: 0.01 / 10 ** (epoch // 3)}, {"local_lr": 0.01, "lr_decay": 10, "lr_decay_every": 3}),
    "toggle": ({"lr": 0.003, "supervision": "toggle"}, {"local_lr": 0.003, "toggle": True}),
    "frozen BatchNorm": ({"lr": 0.003, "bn_stats": "freeze"}, {"local_lr": 0.003, "bn_update": False}),
    "refresh": ({"lr": 0.003, "refresh": 2}, {"local_lr": 0.003, "refresh": 2}),
    "refresh of a frozen prefix": (
        {"rule": "frozen", "supervision": "absolute", "refresh": 5, "bn_stats": "freeze"},
        {"rule": "frozen", "local_lr": 0.01, "refresh": 5, "bn_update": False},
    ),
    "t_shift 2": ({"lr": 0.003, "t_shift": 2, "alpha": 0.99}, {"local_lr": 0.003, "t_shift": 2, "alpha": 0.99}),
}


def epoch_data(epoch):
    data = batches(3, seed=7, dtype=torch.float64)
    return [(x, (y + epoch) % 4) for x, y in data] if epoch in SPOILED else data


def sgd_lr(epoch):
    """Falling, and so are the norms of the update, but for restarts that must keep the boundary where it is."""
    return 0.05 * 0.75**epoch * (8 if epoch in RESTARTS else 1)


@pytest.mark.parametrize("operations", ["compiled", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_epoch_by_epoch(variant, operations, monkeypatch):
    if operations == "reference":
        monkeypatch.setattr(ops, "_C", None)
    elif not ops.is_compiled():
        pytest.skip("the compiled module is not built")
    package_options, paper_options = VARIANTS[variant]
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    model = seeded(TwoBlockResNet).double().to(memory_format=layout)
    paper = StraightLine({n: t.detach().clone() for n, t in model.state_dict().items()}, epochs=EPOCHS, **paper_options)
    optimizer = torch.optim.SGD(model.parameters(), lr=sgd_lr(0), momentum=0.9, weight_decay=5e-4)
    local = LocalizedLearning(model, optimizer, epochs=EPOCHS, preset="paper", **{"t_shift": 1, **package_options})

    boundaries, signs, held = [0], [1], False
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = sgd_lr(epoch)
        lr = paper.local_lr / paper.lr_decay ** (epoch // paper.lr_decay_every)
        assert local.current_lr == pytest.approx(lr, rel=1e-12), f"epoch {epoch}"
        assert local.epoch == epoch
        loss = run_epoch(model, optimizer, [(x.to(memory_format=layout), y) for x, y in epoch_data(epoch)])
        expected = paper.run_epoch(epoch_data(epoch), sgd_lr(epoch))
        local.step(loss)
        held = held or paper.since_move > max(1, int(EPOCHS * paper.t_shift / 5.25))  # the norm alone held the boundary back
        assert loss == pytest.approx(expected, rel=1e-11), f"epoch {epoch}"
        assert (local.boundary, local.sign) == (paper.boundary, paper.sign), f"after epoch {epoch}"
        state = model.state_dict()
        assert state.keys() == paper.state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, paper.state[name], rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        boundaries.append(local.boundary)
        signs.append(local.sign)

    assert model.block1.conv1.weight.is_contiguous(memory_format=layout)
    assert tuple(local.layers) == LAYERS
    assert tuple(local.local_layers) == LAYERS[: local.boundary]
    # The run must have exercised what it is here for.
    assert len(set(boundaries)) >= 3, boundaries
    assert held, boundaries
    assert any(sign < 0 and boundary > 0 for sign, boundary in zip(signs[:-1], boundaries[:-1], strict=True)), (
        signs,
        boundaries,
    )


def test_the_re_implementation_is_sgd_while_nothing_is_local():
    """So that an agreement above means something: with the boundary at 0 the re-implementation is torch's own SGD."""
    model = seeded(TwoBlockResNet).double()
    paper = StraightLine({n: t.detach().clone() for n, t in model.state_dict().items()}, epochs=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        assert run_epoch(model, optimizer, epoch_data(epoch)) == pytest.approx(
            paper.run_epoch(epoch_data(epoch), 0.05), rel=1e-12
        )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, paper.state[name], rtol=1e-11, atol=1e-12)
