"""What ``LocalizedLearning`` does when little is said."""

import warnings

import pytest
import torch
from models import PlainCNN, batches, run_epoch, seeded

from localsgd_ext import DynamicModeSelection, LocalizedLearning, StaticModeSelection, WeakSupervision
from localsgd_ext.learning import PRESETS

EPOCHS = 6
MOVES = {"alpha": 2.0, "t_shift": 1, "min_loss_drop": 0.0}  # in so short a run too


def trained(**options):
    """A network after all epochs, and the boundaries it had."""
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    local = LocalizedLearning(model, optimizer, epochs=EPOCHS, **MOVES, **options)
    boundaries = []
    for epoch in range(EPOCHS):
        loss = run_epoch(model, optimizer, batches(5, seed=epoch))
        boundaries.append(local.boundary)
        local.step(loss)
    return model.state_dict(), boundaries, local


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize(
    ("preset", "schedule", "options"),
    [
        (None, DynamicModeSelection, {"schedule": "dynamic", "l_max": 0.75, "refresh": None}),
        ("default", DynamicModeSelection, {"schedule": "dynamic", "l_max": 0.75, "refresh": None}),
        ("refresh", StaticModeSelection, {"schedule": "linear", "l_max": 0.9, "refresh": 4}),
    ],
)
def test_a_preset_is_what_it_says(preset, schedule, options):
    state, boundaries, local = trained(preset=preset)
    written_out, same_boundaries, _ = trained(rule="frozen", **options)
    assert boundaries == same_boundaries
    assert boundaries[0] == 0
    assert boundaries[-1] > 0
    assert same(state, written_out)
    assert isinstance(local.schedule, schedule)
    assert local.supervision is None  # so that step() needs no loss


@pytest.mark.parametrize(("preset", "drop"), [(None, 0.1), ("default", 0.1), ("refresh", 0.1), ("paper", 0.0)])
def test_presets_wait_for_the_loss_or_do_not(preset, drop):
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    assert LocalizedLearning(model, optimizer, epochs=EPOCHS, preset=preset).schedule.min_loss_drop == drop


def test_the_default_waits_until_the_network_learns_and_says_so_once():
    """With losses made up: the norms, by themselves, let the boundary move after the second epoch."""
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = LocalizedLearning(model, optimizer, epochs=EPOCHS, alpha=100.0, t_shift=1)
    boundaries = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for epoch, loss in enumerate([3.0, 2.9, 2.8, 2.6, 2.5]):
            run_epoch(model, optimizer, batches(2, seed=epoch))
            local.step(loss)
            boundaries.append(local.boundary)
    assert boundaries == [0, 0, 0, 1, 1]
    waits = "the loss is 2.9, it was 3 at first and must fall to 2.7 (min_loss_drop=0 does not wait)"
    assert [str(warning.message) for warning in warned] == [f"the boundary stays at 0: {waits}"]


def test_after_the_first_epoch_there_is_nothing_to_say_yet():
    """A schedule that would move then: no loss can have fallen."""
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.05), epochs=4, schedule="linear")
    run_epoch(model, torch.optim.SGD(model.parameters(), lr=0.05), batches(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local.step(3.0)
    assert local.boundary == 0
    with pytest.warns(UserWarning, match="the boundary stays at 0"):
        local.step(3.0)


def test_the_paper_s_preset_is_what_the_paper_says():
    state, _, local = trained(preset="paper")
    options = {"rule": "hebbian", "schedule": "dynamic", "l_max": 0.75, "lr": 0.01, "supervision": "absolute", "refresh": None}
    assert same(state, trained(**options)[0])
    assert isinstance(local.schedule, DynamicModeSelection)
    assert isinstance(local.supervision, WeakSupervision)
    assert local.current_lr == 0.01


@pytest.mark.parametrize(
    ("option", "value"),
    [("rule", "hebbian"), ("schedule", "quadratic"), ("l_max", 0.5), ("refresh", None), ("refresh", 2), ("preset", "paper")],
)
def test_each_option_overrides_the_preset(option, value):
    unchanged = trained(preset="refresh")[0]
    assert not same(unchanged, trained(**{"preset": "refresh", option: value})[0])


def test_the_hebbian_rule_is_supervised_and_takes_small_steps_unless_told_otherwise():
    *_, local = trained(rule="hebbian")
    assert isinstance(local.supervision, WeakSupervision)
    assert local.current_lr == PRESETS["default"]["lr"] == 1e-4
    with pytest.raises(ValueError, match="epoch_loss"):
        local.step()


def test_without_an_optimizer_refresh_says_what_to_do():
    with pytest.raises(ValueError, match=r"refresh=4 needs the optimizer.*refresh=None does without"):
        LocalizedLearning(seeded(PlainCNN), None, epochs=2, preset="refresh")
    LocalizedLearning(seeded(PlainCNN), None, epochs=2)


def test_refresh_must_be_a_period():
    model = seeded(PlainCNN)
    with pytest.raises(TypeError, match="refresh must be an int, a callable of the epoch or None, got 'often'"):
        LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=2, refresh="often")
