"""Updates without end: no memory leaks, no counter overflows. ``make soak`` makes a million of each, ``make test`` fewer."""

from __future__ import annotations

import gc
from collections.abc import Callable

import psutil
import pytest
import torch
from models import PlainCNN, at, batches, run_epoch, seeded
from torch import nn

from localsgd_ext import HebbianUpdater, LocalizedLearning, apply_update_, correlation, hebbian_update_

MIB = 2**20


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def growth(repeat: Callable[[int], None], calls: int) -> float:
    """MiB by which this process grew over ``calls`` calls, after a tenth of them to warm up."""
    repeat(calls // 10)
    before = resident()
    repeat(calls)
    grown = (resident() - before) / MIB
    print(f"{calls} calls: {grown:+.2f} MiB")
    return grown


def operations() -> Callable[[], None]:
    """An update by each of the three operations, on a linear and a convolutional layer."""
    weight, x = torch.randn(8, 8), torch.randn(4, 8)
    z = x @ weight.t()
    kernel, pictures = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    features = torch.randn(2, 4, 4, 4)
    skipped = torch.zeros((), dtype=torch.int64)
    state = {"turn": 0}

    def call() -> None:
        state["turn"] = (state["turn"] + 1) % 3
        if state["turn"] == 0:
            hebbian_update_(weight, x, z, 1e-3, z_is_output=True, skipped=skipped)
        elif state["turn"] == 1:
            hebbian_update_(kernel, pictures, features, 1e-3, skipped=skipped)
        else:
            apply_update_([weight], [correlation(x, z, weight)], 1e-3, skipped=skipped)

    return call


def hooks() -> Callable[[], None]:
    """A training forward with immediate and deferred writes, and momentum."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    updater = HebbianUpdater(model, lr=1e-3, momentum=0.5)
    updater.enable(["0", "2"], deferred=["2"])
    x = torch.randn(4, 8)
    for p in model.parameters():
        p.requires_grad_(False)
    return lambda: model(x)


@pytest.mark.parametrize(("make", "calls"), [(operations, 1_000_000), (hooks, 500_000)])  # two updates in a forward
def test_updates_leak_no_memory(make: Callable[[], Callable[[], None]], calls: int, soak: bool) -> None:
    """A million calls show a leak of four bytes in each, a few thousand one of a small tensor."""
    call = make()

    def repeat(times: int) -> None:
        for _ in range(times):
            call()

    assert growth(repeat, calls if soak else calls // 100) < (4 if soak else 2)


def test_epochs_leak_no_memory(soak: bool) -> None:
    """The whole method, boundary moves, states and warnings included."""
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = batches(1)

    def repeat(times: int) -> None:
        for _ in range(times):
            with LocalizedLearning(model, optimizer, epochs=20, preset="paper", schedule=at(2)) as local:
                for _ in range(3):
                    local.step(run_epoch(model, optimizer, data))
                local.load_state_dict(local.state_dict())

    assert growth(repeat, 5000 if soak else 100) < (8 if soak else 2)


@pytest.mark.parametrize("start", [2**31 - 2, 2**32 - 2, 2**53])
def test_the_counter_of_skipped_updates_does_not_overflow(start: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    updater = HebbianUpdater(model, lr=0.1)
    updater.enable(["0"])
    nn.init.zeros_(model[0].bias)
    updater._hooks["0"].counter().fill_(start)
    for _ in range(5):
        model(torch.zeros(2, 4))
    assert updater.skipped() == {"0": start + 5}
    again = HebbianUpdater(nn.Sequential(nn.Linear(4, 4)), lr=0.1)
    again.load_state_dict(updater.state_dict())
    assert again.skipped() == {"0": start + 5}
