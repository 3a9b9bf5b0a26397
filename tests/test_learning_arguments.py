"""What the constructor of LocalizedLearning and ``step`` take, and what they refuse."""

import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from models import PlainCNN, batches, changed, run_epoch, seeded, snapshot, with_boundary
from torch import nn

import localsgd_ext
from localsgd_ext import HebbianUpdater, LocalizedLearning, StaticModeSelection, WeakSupervision, freeze_prefix, trace_layers


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
        ({"lr": lambda epoch: float("nan")}, r"lr\(0\) must be finite and at least 0, got nan"),
        ({"lr": lambda epoch: -0.1}, r"lr\(0\) must be finite and at least 0, got -0.1"),
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


HEBBIAN_ONLY = {
    "lr": 0.5, "lr_decay": 3.0, "lr_decay_every": 7, "normalize": False, "activation": torch.relu, "momentum": 0.5, "sample": 0.5,
    "algorithm": "direct", "supervision": "toggle",
}  # fmt: skip


@pytest.mark.parametrize("name", HEBBIAN_ONLY)
def test_what_only_local_updates_use_needs_their_rule(name):
    """The default does not learn locally: who gives a local learning rate and no rule expects something else."""
    model, setting = seeded(PlainCNN), {name: HEBBIAN_ONLY[name]}
    for preset in (None, "default", "refresh"):
        with pytest.raises(ValueError, match=f"{name} needs rule='hebbian'"):
            LocalizedLearning(model, sgd(model), epochs=20, preset=preset, **setting)
    for options in ({"rule": "frozen"}, {"rule": "hebbian"}, {"preset": "paper"}):
        LocalizedLearning(model, sgd(model), epochs=20, **options, **setting).remove()


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"momentum": 7.0}, ValueError),
        ({"sample": 0}, ValueError),
        ({"algorithm": "fast"}, ValueError),
        ({"normalize": "no"}, TypeError),
    ],
)
def test_it_is_checked_without_local_updates_too(wrong, error):
    model = seeded(PlainCNN)
    with pytest.raises(error, match=next(iter(wrong))):
        LocalizedLearning(model, sgd(model), epochs=20, rule="frozen", **wrong)


@pytest.mark.parametrize(("wrong", "error"), [({"alpha": "x"}, TypeError), ({"t_shift": "banana"}, ValueError)])
def test_what_a_static_schedule_does_not_use_is_checked_too(wrong, error):
    model = seeded(PlainCNN)
    with pytest.raises(error, match=next(iter(wrong))):
        LocalizedLearning(model, sgd(model), epochs=20, schedule="linear", **wrong)


def test_what_another_run_has_used_is_refused():
    model, schedule, supervision = seeded(PlainCNN), StaticModeSelection(kind="linear"), WeakSupervision()
    first = LocalizedLearning(model, sgd(model), epochs=3, rule="hebbian", schedule=schedule, supervision=supervision)
    run_epoch(model, sgd(model), batches(1))
    first.step(1.0)
    first.remove()
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match=r"schedule must be new, .* has seen 1 epochs of another run"):
        LocalizedLearning(model, sgd(model), epochs=3, schedule=schedule)
    with pytest.raises(ValueError, match="supervision must be new"):
        LocalizedLearning(model, sgd(model), epochs=3, rule="hebbian", supervision=supervision)


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_a_model_has_one_at_a_time(rule):
    model = seeded(PlainCNN)
    first = LocalizedLearning(model, sgd(model), epochs=3, rule=rule)
    with pytest.raises(ValueError, match="another LocalizedLearning: call remove"):
        LocalizedLearning(model, sgd(model), epochs=3, rule=rule)
    first.remove()
    LocalizedLearning(model, sgd(model), epochs=3, rule=rule).remove()
    assert hooks(model) == 0


def test_one_that_nobody_holds_any_more_is_still_there():
    """Whether or not the garbage collector has been by: what it froze is frozen."""
    model = seeded(PlainCNN)

    def train():
        local = LocalizedLearning(model, sgd(model), epochs=3, schedule=StaticModeSelection(kind=lambda epoch: 2))
        local.trace(batches(1)[0][0])

    train()
    gc.collect()
    with pytest.raises(ValueError, match=r"model\._localized_learning\.owner"):
        train()
    model._localized_learning.owner.remove()
    assert all(p.requires_grad for p in model.parameters())
    train()
    other = pickle.loads(pickle.dumps(model))
    LocalizedLearning(other, sgd(other), epochs=3).remove()


def test_what_fails_leaves_no_hooks_anywhere():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    for wrong in ({"include": "nope"}, {"skip": ".*"}, {"rule": "hebbian", "lr": -1.0}, {"refresh": 0}):
        with pytest.raises(ValueError):  # noqa: PT011  # what each says is tested elsewhere
            LocalizedLearning(model, optimizer, epochs=3, nan_policy="skip", **wrong)
    with pytest.raises(ValueError, match="nan_policy"):
        LocalizedLearning(model, optimizer, epochs=3, rule="hebbian", nan_policy="never")
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    LocalizedLearning(model, optimizer, epochs=3, nan_policy="skip")


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_some_layer_must_be_left(rule):
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match=r"include and skip must leave a layer, got include=None and skip='\.\*'"):
        LocalizedLearning(model, sgd(model), epochs=3, rule=rule, skip=".*")


def test_optimizers_of_another_model_are_warned_of():
    model, older = seeded(PlainCNN), seeded(PlainCNN)
    with pytest.warns(UserWarning, match=r"optimizer \(SGD\) has no parameter of the model"):
        LocalizedLearning(model, sgd(older), epochs=3).remove()
    with warnings.catch_warnings():  # one of the criterion's parameters beside the model's
        warnings.simplefilter("error")
        LocalizedLearning(model, [sgd(model), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)], epochs=3)


def test_an_optimizer_given_twice_counts_once():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    local = LocalizedLearning(
        model, [optimizer, optimizer], epochs=9, schedule=StaticModeSelection(kind=lambda epoch: 2), refresh=2
    )
    local.trace(batches(1)[0][0])
    seen = []
    for x, y in batches(4):
        seen.append(local.refreshing)
        run_epoch(model, optimizer, [(x, y)])
    assert seen == [False, True, False, True]


def test_more_epochs_than_there_are_is_said_once():
    """The likeliest mistake: called for every mini-batch."""
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=2, schedule="linear", min_loss_drop=0)
    run_epoch(model, sgd(model), batches(1))
    local.step()
    local.step()
    with pytest.warns(UserWarning, match="called more than epochs=2 times: call it once in each"):
        local.step()
    local.step()


def test_nothing_is_traced_after_remove():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=2)
    local.remove()
    with pytest.raises(RuntimeError, match=r"trace\(\) was called after remove\(\)"):
        local.trace(batches(1)[0][0])


def test_only_the_models_own_parameters_are_kept_frozen():
    model, other = seeded(PlainCNN), seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=2)
    with pytest.raises(ValueError, match="parameters must be the model's"):
        local.keep_frozen(other.parameters())
    assert all(p.requires_grad for p in other.parameters())


def test_include_names_something():
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match="include must name at least one layer"):
        LocalizedLearning(model, sgd(model), epochs=2, include=[])
    LocalizedLearning(model, sgd(model), epochs=2, skip=[])


def test_layers_and_names_of_an_updater():
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match=r"^layers must match"):
        HebbianUpdater(model, "conv1")
    updater = HebbianUpdater(model)
    with pytest.raises(TypeError, match="names must be several names, got 'fc': put it in a list"):
        updater.enable("fc")


@pytest.mark.parametrize(
    ("boundary", "error", "message"),
    [
        (1.5, ValueError, "index of a layer or a fraction in .0, 1., got 1.5"),
        (1.0, ValueError, "got 1.0"),
        (0.0, ValueError, "got 0.0"),
        (float("nan"), ValueError, "got nan"),
        (99, ValueError, "got 99"),
        (-1, ValueError, "got -1"),
        (True, TypeError, "boundary must be a number, got True"),
        ("2", TypeError, "boundary must be a number, got '2'"),
    ],
)
def test_boundaries_of_freeze_prefix(boundary, error, message):
    model = seeded(PlainCNN)
    with pytest.raises(error, match=message):
        freeze_prefix(model, boundary, batches(1)[0][0])
    assert all(p.requires_grad for p in model.parameters())


def test_boundaries_of_numpy_are_indices():
    assert freeze_prefix(seeded(PlainCNN), np.int64(2), batches(1)[0][0]).boundary == 2


def test_a_fraction_of_less_than_one_layer_is_said():
    with pytest.warns(UserWarning, match="nothing is frozen: boundary=0.05 of 5 layers is less than one"):
        assert freeze_prefix(seeded(PlainCNN), 0.05, batches(1)[0][0]).boundary == 0


def test_tracing_leaves_layers_that_learn_locally_alone():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, lr=0.5)
    before = snapshot(model)
    forwards, order = local._updater.forwards, {id(m): list(m._forward_hooks) for m in model.modules()}
    assert set(trace_layers(model, batches(1)[0][0]).layers) == set(local.layers) - set(local.local_layers)
    assert not changed(model, before)
    assert local._updater.forwards == forwards
    assert {id(m): list(m._forward_hooks) for m in model.modules()} == order
    model.train()(batches(1)[0][0])
    assert changed(model, before)


def test_tracing_leaves_hooks_that_come_and_go_alone():
    """Those of lazy modules take themselves off in the forward."""
    x = batches(1)[0][0]
    for trace in (trace_layers, lambda m, x: LocalizedLearning(m, None, epochs=9, rule="hebbian").trace(x)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
        calls = []
        handle = model[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trace(model, x)
        model(x)
        assert len(calls) == 2
        handle.remove()
        assert not model[0]._forward_pre_hooks


def test_the_benchmark_switch_is_a_bool():
    with pytest.raises(TypeError, match="benchmark must be a bool, got 'off'"):
        localsgd_ext.benchmark = "off"
    assert localsgd_ext.benchmark is False
