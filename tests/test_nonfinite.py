"""NaN and infinity in data, activations and loss, under each ``nan_policy``."""

import copy
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from models import PlainCNN, TwoBlockResNet, at, batches, changed, run_epoch, seeded, snapshot, with_boundary
from torch import nn

from localsgd_ext import LocalizedLearning

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


def sgd(model):
    return OPTIMIZERS["sgd"](model.parameters())


def spoilt(batch, value):
    x, y = batch[0].clone(), batch[1]
    x[2, 1, 3, 3] = value
    return x, y


def messages(local, loss=1.0):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local.step(loss)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("boundary", [1, 3])
def test_skip_leaves_no_trace_of_a_bad_batch(boundary, kind, value):
    """Weights, statistics and the optimizer's state are those of the same training without that mini-batch, to the bit."""
    outcomes = []
    for bad in (True, False):
        model = seeded(TwoBlockResNet)
        optimizer = OPTIMIZERS[kind](model.parameters())
        local = with_boundary(model, optimizer, boundary, lr=0.1, nan_policy="skip")
        good = batches(3)
        run_epoch(model, optimizer, [good[0], *([spoilt(good[1], value)] if bad else []), good[2]])
        outcomes.append((snapshot(model), optimizer.state_dict()["state"]))
        if bad:
            assert local.skipped_steps == 1
            assert local.kept_statistics.keys() >= {"bn", "block1.bn1"}
            assert set(local.kept_statistics.values()) == {1}
            told = messages(local)
            assert len(told) == 3
            (statistics,) = [m for m in told if "put back" in m]
            assert "bn (1), block1.bn1 (1)" in statistics
            (steps,) = [m for m in told if "optimizer steps left out" in m]
            assert "not finite: 1, of the layers " in steps
            assert "fc (1)" in steps
            assert (local.skipped_steps, local.kept_statistics) == (0, {}), "the counts are of the present epoch"
    (first, first_state), (second, second_state) = outcomes
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert first_state.keys() == second_state.keys()
    for index, entries in second_state.items():
        assert all(torch.equal(torch.as_tensor(first_state[index][k]), torch.as_tensor(v)) for k, v in entries.items())


def test_an_activation_that_overflows():
    """The data are finite; the variance and the correlation of the first layer are not, and BatchNorm makes zeros of it."""
    model = seeded(TwoBlockResNet)
    local = with_boundary(model, sgd(model), 2, lr=0.1, nan_policy="skip")
    run_epoch(model, sgd(model), [spoilt(batches(1)[0], 1e30)])
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert (local.skipped, local.kept_statistics, local.skipped_steps) == ({"stem": 1}, {"bn": 1}, 0)


def test_report_lets_it_pass_and_names_what_it_spoilt():
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 3, lr=0.1)
    before = snapshot(model)
    run_epoch(model, optimizer, [spoilt(batches(1)[0], float("nan"))])
    local_weights = {f"{name}.weight" for name in local.local_layers}
    assert not changed(model, before) & local_weights
    told = messages(local)
    assert len(told) == 3
    assert "running statistics are no longer finite and will not recover: bn, block1.bn1" in told[0]
    assert "parameters are no longer finite: block2.conv1.weight" in told[1]
    assert "fc.bias" in told[1]
    assert "stem.weight" not in told[1]
    assert "local updates skipped" in told[2]


def test_a_loss_that_is_not_finite_on_good_activations():
    """Local layers and statistics learn from such a mini-batch; the optimizer must not."""
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, lr=0.1, nan_policy="skip")
    before = snapshot(model)
    x, y = batches(1)[0]
    loss = F.cross_entropy(model(x), y) * float("inf")
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    moved = changed(model, before) & {name for name, _ in model.named_parameters()}
    assert moved == {f"{name}.weight" for name in local.local_layers}
    assert not local.skipped
    assert not local.kept_statistics
    assert local.skipped_steps == 1
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("supervision", [None, "absolute"])
def test_the_epoch_loss_is_reported_once(supervision):
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1, supervision=supervision)
    assert len([m for m in messages(local, float("nan")) if "the epoch loss is nan" in m]) == 1


@pytest.mark.parametrize(("where", "named"), [("data", "bn, block1.bn1"), ("loss", "the epoch loss is nan")])
def test_raise_raises_before_anything_is_changed(where, named):
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", t_shift=1, alpha=100.0, nan_policy="raise")
    for _ in range(3):
        local.step(run_epoch(model, optimizer, batches(2)))
    local.step(1.0)
    if where == "data":
        run_epoch(model, optimizer, [spoilt(batches(1)[0], float("inf"))])
    before, weights, boundary = local.state_dict(), snapshot(model), local.boundary
    with pytest.raises(FloatingPointError, match=f"epoch 4: .*{named}"):
        local.step(float("nan") if where == "loss" else 1.0)
    after = local.state_dict()
    for key in ("epoch", "supervision"):
        assert after[key] == before[key]
    assert after["schedule"] == before["schedule"]
    assert local.boundary == boundary > 0
    assert all(torch.equal(weights[n], t) or torch.isnan(t).any() for n, t in model.state_dict().items())


def test_raise_is_silent_where_a_correlation_is_zero():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1, nan_policy="raise")
    model(torch.zeros(2, 3, 8, 8))
    with pytest.warns(UserWarning, match="zero or not finite: features.0"):
        local.step(1.0)


def test_counts_are_part_of_the_state():
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, nan_policy="skip")
    run_epoch(model, optimizer, [spoilt(batches(1)[0], float("nan"))])
    state = copy.deepcopy(local.state_dict())
    other = seeded(TwoBlockResNet)
    again = LocalizedLearning(other, sgd(other), epochs=20, preset="paper", schedule=at(2), nan_policy="skip")
    again.load_state_dict(state)
    assert (again.skipped_steps, again.kept_statistics) == (1, local.kept_statistics)
    assert messages(again) == messages(local)
    del state["guard"]  # as states were before
    again.load_state_dict(state)


def test_several_optimizers_and_no_gradient_at_all():
    model = seeded(PlainCNN)
    convs, head = sgd(model.features), OPTIMIZERS["adamw"](model.fc.parameters())
    local = LocalizedLearning(model, [convs, head], epochs=6, preset="paper", schedule=at(4), nan_policy="skip")
    convs.step()  # has no gradients: nothing to look at
    assert local.skipped_steps == 0
    before = snapshot(model)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    model.fc.bias.grad[0] = float("nan")
    for optimizer in (convs, head):
        optimizer.step()
    assert local.skipped_steps == 1
    moved = changed(model, before)
    assert "features.0.weight" in moved
    assert not moved & {"fc.weight", "fc.bias"}
    assert "fc (1)" in next(m for m in messages(local) if "left out" in m)


def test_large_gradients_are_finite():
    """The sum of their squares would not be."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    local = LocalizedLearning(model, optimizer, epochs=6, preset="paper", t_shift=1, nan_policy="skip", l_max=1.0)
    before = snapshot(model)
    model(torch.full((1, 2), 1e30)).sum().backward()
    optimizer.step()
    assert local.skipped_steps == 0
    assert "0.weight" in changed(model, before)


@pytest.mark.parametrize("bn", [nn.LazyBatchNorm2d, lambda: nn.BatchNorm2d(4, momentum=None)])
def test_other_forms_of_batch_norm(bn):
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), bn(), nn.Flatten(), nn.Linear(144, 4))

    outcomes = []
    for bad in (True, False):
        model = seeded(build)
        with torch.no_grad():
            model(batches(1)[0][0])
        optimizer = sgd(model)
        LocalizedLearning(model, optimizer, epochs=6, preset="paper", schedule=at(1), nan_policy="skip")
        good = batches(2)
        run_epoch(model, optimizer, [good[0], *([spoilt(good[1], float("nan"))] if bad else []), good[1]])
        outcomes.append(snapshot(model))
    assert all(torch.equal(outcomes[0][name], tensor) for name, tensor in outcomes[1].items())


def test_statistics_frozen_for_the_prefix_stay_frozen():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, bn_stats="freeze", nan_policy="skip")
    before = snapshot(model)
    run_epoch(model, optimizer, [spoilt(batches(1)[0], float("nan")), batches(1)[0]])
    assert {n for n in changed(model, before) if "running" in n} == {
        f"features.{i}.running_{which}" for i in (7, 10) for which in ("mean", "var")
    }
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert local.kept_statistics == {"features.7": 1, "features.10": 1}


def test_with_a_gradient_scaler():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, nan_policy="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for x, y in (batches(1)[0], spoilt(batches(1)[0], float("nan"))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 64.0  # the scaler saw it first, and made no step
    assert local.skipped_steps == 0
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_a_closure_is_refused():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    LocalizedLearning(model, optimizer, epochs=20, preset="paper", nan_policy="skip")
    with pytest.raises(ValueError, match=r"nan_policy='skip' needs step\(\) without a closure"):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match=r"nan_policy='skip' needs step\(\) without a closure"):
        optimizer.step(closure=lambda: torch.zeros(()))


def test_an_unknown_policy_is_refused():
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match="nan_policy must be one of report, skip, raise, got 'ignore'"):
        LocalizedLearning(model, sgd(model), epochs=20, preset="paper", nan_policy="ignore")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_removed_and_copied():
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 2, nan_policy="skip")
    other = copy.deepcopy(model).train()
    other(spoilt(batches(1)[0], float("nan"))[0])
    assert torch.isnan(other.features[1].running_mean).any(), "a copy carries no live hooks"
    assert not local.kept_statistics
    local.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert not optimizer._optimizer_step_pre_hooks


def test_compiled():
    """The same numbers with and without torch.compile, without a graph break and with one graph per boundary."""
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = seeded(PlainCNN)
        optimizer = sgd(model)
        local = LocalizedLearning(
            model, optimizer, epochs=20, preset="paper", schedule=at(2), lr=0.1, nan_policy="skip", supervision=None
        )
        good = batches(3)
        local.trace(good[0][0])
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        counts = []
        for _ in range(2):
            for x, y in (good[0], spoilt(good[1], float("nan")), good[2]):
                loss = F.cross_entropy(forward(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            counts.append((local.skipped_steps, local.kept_statistics))
            messages(local)
        outcomes.append((snapshot(model), counts))
    assert outcomes[0][1] == outcomes[1][1]
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-5, atol=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
