"""What the constructor of LocalizedLearning and ``step`` take, and what they refuse."""

import pytest
import torch
from models import PlainCNN, batches, run_epoch, seeded, with_boundary

from localsgd_ext import LocalizedLearning, StaticModeSelection


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"preset": "best"}, "preset"),
        ({"schedule": "cubic"}, "schedule"),
        ({"alpha": 0}, "alpha"),
        ({"l_max": 0}, "l_max"),
        ({"l_max": 1.1}, "l_max"),
        ({"t_shift": 0}, "t_shift"),
        ({"t_shift": 1.5}, "t_shift"),
        ({"t_shift": "block"}, "t_shift"),
        ({"rule": "oja"}, "rule"),
        ({"lr": -0.1}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr_decay": 0.5}, "lr_decay"),
        ({"lr_decay_every": 0}, "lr_decay_every"),
        ({"supervision": "strong"}, "kind|supervision"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"bn_stats": "drop"}, "bn_stats"),
        ({"algorithm": "fast"}, "algorithm"),
        ({"alpha": float("nan")}, "alpha"),
        ({"lr_decay": float("nan")}, "lr_decay"),
        ({"lr": lambda epoch: float("nan")}, r"lr\(0\) must be finite, got nan"),
        ({"include": "fc("}, r"include .*got 'fc\('"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_hooks(kwargs, name):
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match=name):
        LocalizedLearning(model, sgd(model), **{"epochs": 20, "preset": "paper", **kwargs})
    assert hooks(model) == 0


@pytest.mark.parametrize("hyperparameter", [{"alpha": 0.9}, {"l_max": 0.5}, {"t_shift": 1}, {"min_loss_drop": 0.0}])
def test_hyperparameters_of_a_schedule_that_has_its_own_are_refused(hyperparameter):
    model = seeded(PlainCNN)
    ((name, value),) = hyperparameter.items()
    with pytest.raises(ValueError, match=f"{name} must not be given .* got {value}: give it to StaticModeSelection"):
        LocalizedLearning(model, sgd(model), epochs=20, schedule=StaticModeSelection(kind="linear"), **hyperparameter)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 2.5}, "epochs must be an int, got 2.5"),
        ({"epochs": "20"}, "epochs must be an int, got '20'"),
        ({"epochs": True}, "epochs must be an int, got True"),
        ({"lr_decay": "2"}, "lr_decay must be a number, got '2'"),
        ({"lr_decay": None}, "lr_decay must be a number, got None"),
        ({"lr_decay": True}, "lr_decay must be a number, got True"),
        ({"lr_decay_every": 0.5}, "lr_decay_every must be an int, got 0.5"),
        ({"lr_decay_every": True}, "lr_decay_every must be an int, got True"),
        ({"lr": True}, "lr must be a number, a callable of the epoch or None, got True"),
        ({"lr": "0.1"}, "lr must be a number, a callable of the epoch or None, got '0.1'"),
        ({"lr": lambda epoch: None}, r"lr\(0\) must be a number, got None"),
        ({"lr": lambda epoch: "0.1"}, r"lr\(0\) must be a number, got '0.1'"),
        ({"supervision": 1}, "supervision must be a name, a WeakSupervision or None, got 1"),
        ({"on_boundary_move": 1}, "on_boundary_move must be callable or None, got 1"),
        ({"activation": "relu"}, "activation must be callable, got str"),
        ({"skip": 3}, "skip must be a name or regular expression, or several, got 3"),
        ({"include": ["fc", None]}, "include must be a name or regular expression, or several, got None"),
    ],
)
def test_arguments_of_a_wrong_type_are_named_at_once(kwargs, message):
    model = seeded(PlainCNN)
    with pytest.raises(TypeError, match=message):
        LocalizedLearning(model, sgd(model), **{"epochs": 20, "preset": "paper", **kwargs})
    assert hooks(model) == 0


@pytest.mark.parametrize("wrong", [0.1, "sgd", [0.1]])
def test_an_optimizer_must_be_an_optimizer(wrong):
    model = seeded(PlainCNN)
    with pytest.raises(TypeError, match="optimizer"):
        LocalizedLearning(model, wrong, epochs=20, preset="paper")
    assert hooks(model) == 0


@pytest.mark.parametrize("loss", [1.0, torch.tensor(1.0), torch.tensor([1.0]), torch.tensor(1.0, requires_grad=True)])
def test_step_takes_floats_and_tensors_of_one_element(loss):
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1)
    local.step(0.5)
    run_epoch(model, sgd(model), batches(1))
    local.step(loss)
    assert local.sign == -1


@pytest.mark.parametrize("loss", [None, torch.tensor([1.0, 2.0]), "0.5", [0.5], 1j, True, torch.tensor(1j)])
def test_step_refuses_other_losses(loss):
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1)
    with pytest.raises((ValueError, TypeError), match="epoch_loss"):
        local.step(loss)


@pytest.mark.parametrize(("nonsense", "error"), [(None, TypeError), (float("inf"), ValueError)])
@pytest.mark.parametrize("name", ["lr", "schedule"])
def test_a_callable_that_answers_nonsense_later_changes_nothing(name, nonsense, error):
    answers = [0, 1]
    kind = (lambda epoch: answers[epoch]) if name == "schedule" else (lambda epoch: epoch)
    lr = (lambda epoch: answers[epoch]) if name == "lr" else 0.01
    model = seeded(PlainCNN)
    # Of two epochs: the schedule is asked for both at the first training forward.
    local = LocalizedLearning(model, sgd(model), epochs=2, rule="hebbian", schedule=StaticModeSelection(kind=kind), lr=lr)
    run_epoch(model, sgd(model), batches(1))
    before = local.state_dict()
    answers[1] = nonsense
    with pytest.raises(error, match=r"\(1\) must be"):
        local.step(1.0)
    after = local.state_dict()
    assert [after[part] for part in ("epoch", "schedule", "supervision")] == [
        before[part] for part in ("epoch", "schedule", "supervision")
    ]
    answers[1] = 1
    local.step(1.0)
    assert (local.epoch, local.schedule.epoch, local.boundary) == (1, 1, 1)
