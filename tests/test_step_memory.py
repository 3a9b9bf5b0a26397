"""What a training step takes: bytes counted by hand, and a device's counters."""

import pytest
import torch
import torch.nn.functional as F
from growing import LAST, PARAMETERS, STOPPED, WHOLE, FakeDevice, Run, moving
from torch import nn

from localsgd_ext import LocalizedLearning
from localsgd_ext.batch_growth import PeakMemory, SavedMemory, StepMemory


@pytest.mark.parametrize("samples", [1, 3])
def test_memory_of_a_step_by_hand(samples):
    run = Run(budget=1, boundaries=(0, 2))
    measure = SavedMemory(run.local, torch.randn(samples, 8))
    run.epoch(0)  # the optimizer has momentum of every parameter, and then of the last layer's alone
    assert run.local.boundary == 2
    assert measure(False) == StepMemory(4 * (PARAMETERS + LAST + LAST), STOPPED * samples, samples)
    assert measure(True) == StepMemory(4 * (PARAMETERS + PARAMETERS + LAST), WHOLE * samples, samples)


def test_measuring_changes_nothing():
    def train(measures):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        local = LocalizedLearning(model, optimizer, epochs=9, preset="paper", schedule=moving(0, 1, 2))
        x, y = torch.randn(6, 3, 6, 6), torch.randint(4, (6,))
        for _ in range(4):
            for _ in range(2):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            local.step(loss)
            if measures:
                SavedMemory(local, x)(True)
                SavedMemory(local, x)(False)
        return [*model.state_dict().values(), torch.get_rng_state()], [p.requires_grad for p in model.parameters()]

    (plain, learning), (measured, learning_too) = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert learning == learning_too


def test_memory_of_another_batch():
    assert StepMemory(constant=100, activations=30, batch_size=6).at(12) == 100 + 60


def test_peaks_of_a_device(monkeypatch):
    run = Run(budget=1, boundaries=(0, 1, 2, 1), refresh=3)
    device = FakeDevice(monkeypatch)
    device.allocated = 1000
    measure = PeakMemory(run.local, run.batch_sampler)
    assert measure(True) is None
    run.local.trace(torch.randn(2, 8))
    device.step(run, 9000)
    device.step(run, 8000)
    run.local.step()
    assert measure(True) == StepMemory(1000, 8000, 8)
    assert measure(False) == StepMemory(1000, 8000, 8)  # no step at boundary 1 yet: at most a whole one's
    for peak in (5000, 6000, 8500):  # the third is the refresh
        assert run.local.refreshing == (peak == 8500)
        device.step(run, peak)
    assert measure(True).activations == 8000  # the largest so far, in epoch 0
    assert measure(False) == StepMemory(1000, 5000, 8)
    run.local.step()
    assert measure(False).activations == 5000  # boundary 2: at most what was at 1
    device.step(run, 3000)
    assert measure(False).activations == 2000
    run.local.step()
    assert measure(False).activations == 8000  # back to 1: what stopped at 2 says nothing
    run.batch_sampler.batch_size = 16
    device.step(run, 7000)
    assert measure(False) == StepMemory(1000, 6000, 16)
    measure.remove()
    device.step(run, 10**6)
    assert measure(False) == StepMemory(1000, 6000, 16)


@pytest.mark.parametrize(("inputs", "got"), [((), "nothing"), ((torch.zeros(0, 8),), r"shape \(0, 8\)"), ((3,), "int")])
def test_bad_inputs_of_saved_memory(inputs, got):
    with pytest.raises(ValueError, match=f"inputs must have a tensor of at least one sample, got {got}"):
        SavedMemory(Run(budget=1).local, *inputs)


def test_peak_memory_needs_a_device():
    run = Run(budget=1)
    with pytest.raises(ValueError, match="local must be of a network on a CUDA device, got one on cpu"):
        PeakMemory(run.local, run.batch_sampler)
