"""What the user has frozen stays as it is, whatever the boundary and refreshes do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import PlainCNN, batches, seeded

from localsgd_ext import LocalizedLearning, StaticModeSelection


class Run:
    """``PlainCNN`` with the boundary at ``boundaries[epoch]``, every second mini-batch through the prefix."""

    def __init__(self, *boundaries, rule="frozen", trace=True, **options):
        self.model = seeded(PlainCNN)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = StaticModeSelection(kind=lambda epoch: (*boundaries, boundaries[-1])[epoch], l_max=0.8)
        options = {"preset": "paper", "lr": 0.01, "refresh": 2, "supervision": None, **options}
        self.local = LocalizedLearning(
            self.model, self.optimizer, epochs=len(boundaries), rule=rule, schedule=schedule, **options
        )
        if trace:
            self.local.trace(torch.zeros(2, 3, 8, 8))

    def steps(self, count):
        for x, y in batches(count, seed=1):
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def moved(self, parameters, count=4):
        """Which of them ``count`` mini-batches, two of them through the prefix, move."""
        before = [p.detach().clone() for p in parameters]
        self.steps(count)
        self.local._updater and self.local._updater.flush()
        return [not torch.equal(p, b) for p, b in zip(parameters, before, strict=True)]


def weight_and_norm(model):
    """Of one layer in the prefix, and the weight of the next."""
    return [model.features[3].weight, model.features[4].weight, model.features[6].weight]


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_before_the_boundary_passes_it(rule):
    run = Run(0, 3, 0, rule=rule)
    parameters = weight_and_norm(run.model)
    assert run.moved(parameters) == [True, True, True]
    for p in parameters[:2]:
        p.requires_grad_(False)
    run.local.step()
    assert run.local.boundary == 3
    assert run.local.local_layers == ("features.0", "features.6")
    assert run.moved(parameters) == [False, False, True]
    run.local.step()
    assert run.local.boundary == 0
    assert run.moved(parameters) == [False, False, True]
    run.local.remove()
    assert [p.requires_grad for p in parameters] == [False, False, True]


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_while_the_prefix_is_open(rule):
    run = Run(3, 3, 0, rule=rule)
    parameters = weight_and_norm(run.model)
    run.steps(1)
    assert run.local.refreshing
    for p in parameters[:2]:
        p.requires_grad_(False)
    assert run.local.local_layers == ("features.0", "features.6")
    assert run.moved(parameters) == [False, False, True]  # in the refresh itself, in the one after it, and in between
    assert all(p.grad is None for p in parameters[:2])
    assert run.local.local_layers == ("features.0", "features.6")
    for _ in range(2):
        run.local.step()
        assert run.moved(parameters) == [False, False, True]
    assert run.local.boundary == 0
    run.local.remove()
    assert [p.requires_grad for p in parameters] == [False, False, True]


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_while_the_boundary_has_frozen_it_already(rule):
    run = Run(3, 3, 0, rule=rule)
    parameters = weight_and_norm(run.model)
    assert not run.local.refreshing
    run.local.keep_frozen(iter(parameters[:2]))
    for _ in range(3):
        assert run.moved(parameters) == [False, False, True]
        run.local.step()
    assert run.local.boundary == 0
    run.local.remove()
    assert [p.requires_grad for p in parameters] == [False, False, True]


def test_what_the_user_thaws_is_the_boundarys_again():
    run = Run(3, 3, 0)
    parameters = weight_and_norm(run.model)
    run.local.keep_frozen(parameters)
    for p in parameters:
        p.requires_grad_(True)
    run.local.step()
    assert not any(p.requires_grad for p in parameters)
    assert run.moved(parameters) == [True, True, True]
    run.local.step()
    assert all(p.requires_grad for p in parameters)


def test_before_the_first_forward():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=4, refresh=2)
    local.keep_frozen(model.features[3].parameters())
    with pytest.warns(UserWarning, match=r"features\.3: its weight is frozen"):
        local.trace(torch.zeros(2, 3, 8, 8))
    assert not any(p.requires_grad for p in model.features[3].parameters())


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ("features.3.weight", "str in it"),
        ([3], "int in it"),
        (torch.nn.Parameter(torch.zeros(2)), "a single Parameter: put it in a list"),
        (torch.zeros(2), "a single Tensor: put it in a list"),
        (torch.nn.Linear(2, 2), "Linear"),
        (None, "NoneType"),
    ],
)
def test_mistakes(wrong, got):
    run = Run(3)
    with pytest.raises(TypeError, match=f"^parameters must be an iterable of torch.nn.Parameter, got {got}$"):
        run.local.keep_frozen(wrong)


ORDERS = ("keep trace load", "trace keep load", "keep load", "load keep", "load keep load")


@pytest.mark.parametrize("saved_by", ["trace keep", "keep trace"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
@pytest.mark.filterwarnings("ignore:left out of localized learning")
def test_resuming_whenever_the_freezing_is_said_again(rule, order, saved_by):
    """It is no part of the state; a layer that is frozen when the order is found is no layer there."""

    def made(steps, state=None):
        run = Run(3, 3, 0, rule=rule, trace=False)
        frozen = weight_and_norm(run.model)[:2]
        if state is not None:
            run.model.load_state_dict(state[0])
            run.optimizer.load_state_dict(state[1])
        does = {
            "keep": lambda: run.local.keep_frozen(frozen),
            "trace": lambda: run.local.trace(torch.zeros(2, 3, 8, 8)),
            "load": lambda: run.local.load_state_dict(state[2]),
        }
        for step in steps.split():
            does[step]()
        return run

    def finished(run):
        parameters = weight_and_norm(run.model)
        for _ in range(2):
            assert run.moved(parameters) == [False, False, True]
            run.local.step()
        assert run.local.boundary == 0
        assert run.moved(parameters) == [False, False, True]
        return [*run.model.state_dict().values(), *[p.requires_grad for p in run.model.parameters()]]

    whole = made(saved_by)
    whole.steps(3)
    state = copy.deepcopy(run_state(whole))
    resumed = made(order, state)
    assert resumed.local.layers == whole.local.layers
    assert resumed.local.local_layers == whole.local.local_layers
    assert all(
        a is b if isinstance(a, bool) else torch.equal(a, b) for a, b in zip(finished(whole), finished(resumed), strict=True)
    )


def run_state(run):
    local = run.local.state_dict()  # first: it makes deferred updates
    return run.model.state_dict(), run.optimizer.state_dict(), local


@pytest.mark.filterwarnings("ignore:left out of localized learning")
def test_a_state_with_a_layer_that_was_frozen_here_and_is_no_more():
    state = Run(3).local.state_dict()
    run = Run(3, trace=False)
    run.model.features[3].weight.requires_grad_(False)
    run.local.trace(torch.zeros(2, 3, 8, 8))
    run.model.features[3].weight.requires_grad_(True)
    with pytest.raises(
        ValueError,
        match=r"has a layer 'features\.3', which is none here: its weight is frozen .*; freeze it after load_state_dict",
    ):
        run.local.load_state_dict(state)
