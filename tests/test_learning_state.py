"""Checkpoints: an interrupted run, continued in a new process, ends where the uninterrupted one does, to the bit."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import PlainCNN, TwoBlockResNet, batches, run_epoch, seeded, twice_used, with_boundary
from resume import SCENARIOS, STEPS, Run, checkpoint

from localsgd_ext import LocalizedLearning

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every scenario uninterrupted, with a checkpoint at every cut, each continued by one other process."""
    torch.set_num_threads(1)  # as there: a fixture of a module runs before the one that does so for every test
    directory = tmp_path_factory.mktemp("resume")
    whole = {}
    for name, scenario in SCENARIOS.items():
        run = Run(scenario)
        run.train(0, STEPS)
        whole[name] = run.result(), run.boundaries
        interrupted, done = Run(scenario), 0
        for cut in scenario.cuts:
            interrupted.train(done, cut)
            torch.save(interrupted.state(), checkpoint(directory, name, cut))
            done = cut
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(TESTS / "resume.py"), str(directory)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    return directory, whole


def assert_same(here, there, where):
    assert type(here) is type(there), where
    if isinstance(here, torch.Tensor):
        assert here.dtype == there.dtype, where
        assert torch.equal(here, there), where
    elif isinstance(here, dict):
        assert here.keys() == there.keys(), where
        for key, value in here.items():
            assert_same(value, there[key], f"{where}.{key}")
    elif isinstance(here, list | tuple):
        assert len(here) == len(there), where
        for i, (a, b) in enumerate(zip(here, there, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert here == there, where


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name, scenario in SCENARIOS.items() for cut in scenario.cuts])
def test_a_new_process_continues_to_the_bit(runs, name, cut):
    directory, whole = runs
    expected, _ = whole[name]
    assert_same(torch.load(checkpoint(directory, name, cut).with_suffix(".done"), weights_only=True), expected, name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_runs_compared_do_move_the_boundary_and_learn_locally(runs, name):
    _, whole = runs
    result, boundaries = whole[name]
    assert len(set(boundaries)) > (1 if name == "mid-epoch" else 2), boundaries
    assert result["sign"] == -1  # the loss rose in the last epoch, and three times in all


def test_a_state_is_a_copy():
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", t_shift=1, alpha=100, momentum=0.5)
    for _ in range(3):
        local.step(run_epoch(model, optimizer, batches()))
    state = local.state_dict()
    frozen = copy.deepcopy(state)
    for _ in range(2):
        local.step(run_epoch(model, optimizer, batches()))
    assert_same(state, frozen, "state")


def test_loading_goes_back_in_the_same_object():
    """Rolling back after a bad epoch: parameters that were frozen since must learn by SGD again."""
    run = Run(SCENARIOS["sgd"])
    run.train(0, 3)
    state = copy.deepcopy(run.state())
    run.train(3, STEPS)
    expected = run.result()
    boundary = run.local.boundary
    assert boundary >= 2
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.local.load_state_dict(state["local"])
    assert run.local.boundary == 0
    assert all(p.requires_grad for p in run.model.parameters())
    run.train(3, STEPS)
    assert_same(run.result(), expected, "rolled back")


def test_a_state_saved_before_the_first_forward_loads():
    first, second = (Run(SCENARIOS["sgd"]) for _ in range(2))
    second.local.load_state_dict(first.local.state_dict())
    for run in (first, second):
        run.train(0, STEPS)
    assert_same(second.result(), first.result(), "fresh")


def test_loading_goes_back_to_before_the_first_forward():
    run = Run(SCENARIOS["sgd"])
    state = copy.deepcopy(run.state())
    run.train(0, STEPS)
    expected = run.result()
    assert run.local.boundary >= 2
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.local.load_state_dict(state["local"])
    assert run.local.boundary == 0
    assert all(p.requires_grad for p in run.model.parameters())
    before = copy.deepcopy(run.model.state_dict())
    run.model(run.data[0][0])
    assert not any(torch.equal(before[n], t) for n, t in run.model.state_dict().items() if "running_mean" in n)
    assert all(torch.equal(before[n], p) for n, p in run.model.named_parameters()), "no layer is local any more"
    run.model.load_state_dict(state["model"])
    run.train(0, STEPS)
    assert_same(run.result(), expected, "from the start")


def test_the_state_of_another_network_is_refused_by_name():
    model = seeded(PlainCNN)
    state = with_boundary(model, torch.optim.SGD(model.parameters(), lr=0.05), 2).state_dict()
    other = seeded(TwoBlockResNet)
    local = LocalizedLearning(other, torch.optim.SGD(other.parameters(), lr=0.05), epochs=20, preset="paper")
    with pytest.raises(ValueError, match=r"features\.0"):
        local.load_state_dict(state)
    assert local.boundary == 0
    assert all(p.requires_grad for p in other.parameters())


def test_the_state_of_a_wider_network_is_refused_by_name():
    model = seeded(PlainCNN)
    state = with_boundary(model, torch.optim.SGD(model.parameters(), lr=0.05), 2).state_dict()
    other = PlainCNN(widths=(4, 5, 8, 7))
    local = LocalizedLearning(other, torch.optim.SGD(other.parameters(), lr=0.05), epochs=20, preset="paper")
    with pytest.raises(ValueError, match=r"features\.6"):
        local.load_state_dict(state)


def fresh():
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = LocalizedLearning(model, optimizer, epochs=20, preset="paper", t_shift=1)
    local.step(run_epoch(model, optimizer, batches(1)))
    return local


def test_a_traced_object_refuses_another_order_of_layers():
    local, other = fresh(), fresh()
    state = local.state_dict()
    state["plan"] = {**state["plan"], "layers": state["plan"]["layers"][::-1], "shapes": state["plan"]["shapes"][::-1]}
    with pytest.raises(ValueError, match="another network"):
        other.load_state_dict(state)


def test_another_format_is_refused():
    local = fresh()
    state = local.state_dict()
    for wrong in ({**state, "format": 999}, {}):
        with pytest.raises(ValueError, match="format"):
            local.load_state_dict(wrong)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"rule": "frozen"}, "rule"), ({"supervision": None}, "supervision"), ({"schedule": "linear"}, "Selection")],
)
def test_the_state_of_other_options_is_refused(kwargs, message):
    state = fresh().state_dict()
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.05), epochs=20, preset="paper", **kwargs)
    with pytest.raises(ValueError, match=message):
        local.load_state_dict(state)


def test_a_frozen_run_goes_on_from_a_state_with_supervision_or_without():
    """It had one in ``localsgd train`` once, and nothing that it turns round."""
    states = []
    for supervision in ("absolute", None):
        model = seeded(PlainCNN)
        local = LocalizedLearning(model, None, epochs=20, rule="frozen", supervision=supervision)
        for state in states:
            local.load_state_dict(state)
        states.append(local.state_dict())
        local.load_state_dict(states[0])
        states.append(local.state_dict())


def test_the_state_of_a_run_of_another_length_is_refused():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, None, epochs=30, preset="paper", t_shift=1)
    with pytest.raises(ValueError, match="a run of epochs=20, this is of epochs=30: give epochs=20"):
        local.load_state_dict(fresh().state_dict())
    assert local.epoch == 0


def test_the_state_of_a_run_with_a_refresh_is_not_loaded_without_one():
    def made(**kwargs):
        model = seeded(PlainCNN)
        return LocalizedLearning(model, torch.optim.SGD(model.parameters(), lr=0.05), epochs=20, **kwargs)

    state = made(preset="refresh").state_dict()
    with pytest.raises(ValueError, match="refresh"):
        made(schedule="linear", l_max=0.9).load_state_dict(state)
    made(preset="refresh").load_state_dict(state)
    made(schedule="linear", refresh=2).load_state_dict(
        made(schedule="linear").state_dict()
    )  # nothing is lost: it begins to count


def test_loading_discards_updates_that_were_still_pending():
    model = seeded(twice_used)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    local = with_boundary(model, optimizer, 2, lr=0.5)
    state, weights = local.state_dict(), copy.deepcopy(model.state_dict())
    model(batches(1)[0][0])  # leaves a deferred write
    model.load_state_dict(weights)
    local.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        model(batches(1)[0][0])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
