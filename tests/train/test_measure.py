from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from localsgd_ext.saved import saved_activations
from localsgd_ext.train.measure import PHASES, PhaseTimer, multiply_adds


def test_bytes_saved_by_a_small_chain() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(4, 8)
    with saved_activations(model) as saved:
        model(x)
    # The input (4 x 8 floats) for the first weight's gradient; the ReLU's output (4 x 16), which ReLU and the second layer
    # both save, once; the second layer's weight not at all.
    assert saved.total == 4 * 8 * 4 + 4 * 16 * 4


def test_a_frozen_prefix_saves_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    with saved_activations(model) as saved:
        loss = model(torch.randn(4, 8)).sum()
    assert saved.total == 4 * 16 * 4  # the input of the second linear layer alone
    loss.backward()
    assert model[2].weight.grad is not None


def test_views_of_one_storage_count_once_in_full() -> None:
    x = torch.randn(6, 4)
    weight = torch.randn(4, requires_grad=True)
    with saved_activations(nn.Module()) as saved:
        loss = (x[:3] * weight).sum() + (x[3:] * weight).sum()
    assert saved.total == 6 * 4 * 4
    loss.backward()


def test_gradients_are_the_same_when_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    x = torch.randn(5, 3, 8, 8)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with saved_activations(model):
        loss = model(x).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), plain, strict=True) if p.grad is not None)


class Marked(torch.autograd.Function):
    """The identity, whose node of the graph holds an object that a weak reference can watch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mark: set[int]) -> torch.Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def test_a_graph_that_is_never_used_is_freed() -> None:
    first, mark = nn.Linear(8, 16), set[int]()
    alive = weakref.ref(mark)
    with saved_activations(first) as saved:
        loss = torch.relu(Marked.apply(first(torch.randn(4, 8)), mark)).sum()  # the ReLU saves its own output
    assert saved.total > 0
    del mark
    assert alive() is not None  # the graph holds it
    del loss
    gc.collect()
    assert alive() is None


def test_medians_leave_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(
        [0.0, 1.0, 2.0, 3.0, 4.0, *(4 + t for t in (0.001, 0.003, 0.006, 0.010)), *(5 + t for t in (0, 0.004, 0.009, 0.015))]
    )
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    for _ in range(2):
        for phase in PHASES:
            timer.mark(phase)
    assert timer.medians() == pytest.approx({"data": 1, "forward": 2, "backward": 3, "optimizer": 4})


def test_medians_of_two_kinds_of_steps_count_as_often_as_there_were_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A median of all would be that of the more frequent kind alone."""
    durations = {False: (9.0, 0.001, 0.002, 0.003), True: (0.010, 0.020)}  # the first of all is left out
    taken = {kind: iter(values) for kind, values in durations.items()}
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = PhaseTimer(torch.device("cpu"))
    timer.start()
    for kind in (False, False, True, False, False, True):
        timer.kind(kind)
        for phase in PHASES:
            now += next(taken[kind]) if phase == "backward" else 0.0
            timer.mark(phase)
    assert timer.medians() == pytest.approx({"data": 0, "forward": 0, "backward": (4 * 2 + 2 * 15) / 6, "optimizer": 0})


def test_medians_of_a_single_step_and_of_none() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    assert timer.medians() == dict.fromkeys(PHASES, 0.0)
    timer.start()
    for phase in PHASES:
        timer.mark(phase)
    assert all(value > 0 for value in timer.medians().values())


def test_multiply_adds_of_a_small_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.Linear(54, 5)
    )
    conv, grouped, linear = 2 * 4 * 9 * 27, 2 * 6 * 9 * 2, 2 * 5 * 54
    x = torch.randn(2, 3, 5, 5)
    with multiply_adds(model) as sgd:
        model(x)
    assert sgd.total == 2 * conv + 3 * grouped + 3 * linear  # nobody needs the gradient of the pictures
    for name in ("0", "2"):
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(False)
    with multiply_adds(model) as frozen:
        model(x)
    assert frozen.total == conv + grouped + 2 * linear
    with multiply_adds(model, local=("0", "2"), sample=0.5) as local:
        model(x)
    assert local.total == 1.5 * conv + 1.5 * grouped + 2 * linear
    model(x)
    assert local.total == 1.5 * conv + 1.5 * grouped + 2 * linear  # the hooks are gone
