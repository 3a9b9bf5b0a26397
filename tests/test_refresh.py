"""Mini-batches that back-propagate through the prefix: which ones, and what they leave behind."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from models import PlainCNN, batches, run_epoch, seeded

from localsgd_ext import LocalizedLearning, StaticModeSelection
from localsgd_ext.refresh import Refresh


def fixed(boundary):
    return StaticModeSelection(kind=lambda epoch: boundary, l_max=0.8)


def plain_cnn(boundary=3, momentum=0.9, **options):
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=5e-4)
    local = LocalizedLearning(model, optimizer, epochs=10, preset="paper", schedule=fixed(boundary), **options)
    local.trace(torch.zeros(2, 3, 8, 8))
    return model, optimizer, local


def step(model, optimizer, x, y):
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def prefix_of(model):
    """Of the first three convolutions and their norms."""
    return [p.detach().clone() for p in model.features[:9].parameters()]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_one_mini_batch_in_so_many_is_one(every):
    refresh = Refresh(every)
    due = []
    for _ in range(3 * every):
        due.append(refresh.due(0))
        refresh.advance(0)
    assert due == ([False] * (every - 1) + [True]) * 3


def test_the_period_may_follow_the_epoch():
    refresh = Refresh(lambda epoch: 2 + epoch)
    due = []
    for epoch in (0, 0, 0, 0, 1, 1, 1, 1):
        due.append(refresh.due(epoch))
        refresh.advance(epoch)
    assert due == [False, True, False, True, False, False, True, False]


@pytest.mark.parametrize("every", [0, -1])
def test_refuses_periods_that_are_none(every):
    with pytest.raises(ValueError, match="refresh must be at least 1"):
        Refresh(every)
    with pytest.raises(ValueError, match="refresh must be at least 1"):
        Refresh(lambda epoch: every).due(0)


@pytest.mark.parametrize("every", [0.5, True, "2", [2]])
def test_refuses_what_is_no_period(every):
    with pytest.raises(TypeError, match="refresh must be an int"):
        plain_cnn(refresh=every)


def test_needs_an_optimizer_to_count():
    with pytest.raises(ValueError, match="refresh=4 needs the optimizer"):
        LocalizedLearning(PlainCNN(), None, epochs=10, preset="paper", refresh=4)


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_a_refresh_in_every_mini_batch_is_sgd(rule):
    model, optimizer, local = plain_cnn(rule=rule, refresh=1)
    plain = seeded(PlainCNN)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        assert run_epoch(model, optimizer, batches(3, seed=1)) == run_epoch(plain, sgd, batches(3, seed=1))
        local.step(1.0)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_in_between_the_prefix_learns_locally():
    model, optimizer, _ = plain_cnn(lr=0.01, refresh=3)
    lengths, momenta = [], []
    for x, y in batches(6, seed=1):
        before = model.features[3].weight.detach().clone()
        step(model, optimizer, x, y)
        lengths.append((model.features[3].weight - before).norm().item())
        momenta.append("momentum_buffer" in optimizer.state.get(model.features[3].weight, {}))
    local = [0, 1, 3, 4]
    assert [lengths[i] for i in local] == pytest.approx([0.01] * 4, rel=1e-4)
    assert all(lengths[i] != pytest.approx(0.01, rel=1e-2) for i in (2, 5))
    assert momenta == [False, False, True, True, True, True]


@pytest.mark.parametrize("rule", ["hebbian", "frozen"])
def test_nothing_of_a_refresh_is_left_to_the_next_mini_batch(rule):
    """Neither gradients, which momentum and weight decay would go on with, nor a graph, whose activations are the memory."""
    model, optimizer, local = plain_cnn(rule=rule, refresh=2)
    saved = []
    for x, y in batches(4, seed=1):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = F.cross_entropy(model(x), y)
        saved.append(sum(kept))
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        prefix = [p for n, p in model.named_parameters() if n in local._prefix().frozen]
        assert all(p.grad is None or p.requires_grad for p in prefix)
    assert saved[0] == saved[2] < saved[1] == saved[3]


def test_a_mini_batch_ends_with_the_optimizer_step_however_many_forwards_it_takes():
    whole, whole_optimizer, _ = plain_cnn(rule="frozen", refresh=2, bn_stats="freeze")
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    parts, parts_optimizer, _ = plain_cnn(rule="frozen", refresh=2, bn_stats="freeze")
    for module in parts.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for x, y in batches(4, seed=1, dtype=torch.float32):
        step(whole, whole_optimizer, x, y)
        parts_optimizer.zero_grad(set_to_none=True)
        half = len(x) // 2
        for i in (0, half):
            (F.cross_entropy(parts(x[i : i + half]), y[i : i + half]) / 2).backward()
        parts_optimizer.step()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_several_optimizers_must_all_have_stepped():
    model = seeded(PlainCNN)
    halves = list(model.features.parameters()), list(model.fc.parameters())
    optimizers = [torch.optim.SGD(half, lr=0.05) for half in halves]
    local = LocalizedLearning(model, optimizers, epochs=10, preset="paper", schedule=fixed(3), rule="frozen", refresh=2)
    local.trace(torch.zeros(2, 3, 8, 8))
    moved = []
    for (x, y), order in zip(batches(6, seed=1), itertools.cycle([(0, 1), (1, 0)]), strict=False):
        before = prefix_of(model)
        F.cross_entropy(model(x), y).backward()
        for i in order:
            optimizers[i].step()
            optimizers[i].zero_grad()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, prefix_of(model), strict=True)))
    assert moved == [False, True] * 3


def test_the_schedule_moves_while_the_next_mini_batch_is_a_refresh():
    model, optimizer, local = plain_cnn(rule="frozen", refresh=4)
    local.schedule = StaticModeSelection(5, 10, kind=lambda epoch: min(epoch, 3), l_max=0.8)
    for epoch in range(1, 5):
        local.step(1.0)
        assert local.boundary == min(epoch, 3)
        run_epoch(model, optimizer, batches(3, seed=1))  # three of a period of four: the next one is due at the first move
        weight = model.features[0].weight
        assert weight.requires_grad == local._prefix().is_open


def test_remove_gives_everything_back():
    model, optimizer, local = plain_cnn(refresh=2)
    local.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks
    before = prefix_of(model)
    step(model, optimizer, *batches(1, seed=1)[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, prefix_of(model), strict=True))


def test_a_copied_model_knows_nothing_of_it():
    model, optimizer, _ = plain_cnn(refresh=2)
    x, y = batches(1, seed=1)[0]
    step(model, optimizer, x, y)  # the next one is a refresh
    copied = copy.deepcopy(model)
    before = prefix_of(copied)
    copied(x)
    assert all(torch.equal(a, b) for a, b in zip(before, prefix_of(copied), strict=True))


@pytest.mark.parametrize("skipped", ["front", "back", None])
def test_an_optimizer_that_misses_a_step_does_not_end_refreshing(skipped):
    """As GradScaler makes it, where the gradients of one optimizer alone overflow."""
    model = seeded(PlainCNN)
    layers = list(model.features[:9].parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in layers)]
    optimizers = {"back": torch.optim.SGD(rest, lr=0.05), "front": torch.optim.SGD(layers, lr=0.05)}
    local = LocalizedLearning(model, optimizers.values(), epochs=10, schedule=fixed(3), rule="frozen", refresh=4)
    local.trace(torch.zeros(2, 3, 8, 8))
    moved = []
    for i, (x, y) in enumerate(batches(26)):
        before = prefix_of(model)
        F.cross_entropy(model(x), y).backward()
        for name, optimizer in optimizers.items():
            if (i, name) != (1, skipped):
                optimizer.step()
            optimizer.zero_grad()
        if not all(map(torch.equal, before, prefix_of(model))):
            moved.append(i)
    assert 5 <= len(moved) <= 6, moved
    assert {b - a for a, b in itertools.pairwise(moved)} == {4}
    assert not local.refreshing or all(p.grad is None for p in layers)


def test_fused_sgd_refreshes_a_prefix_that_never_had_momentum():
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    local = LocalizedLearning(model, optimizer, epochs=10, schedule=fixed(3), rule="frozen", refresh=2)
    local.trace(torch.zeros(2, 3, 8, 8))
    before = prefix_of(model)
    for x, y in batches(4):
        step(model, optimizer, x, y)
    assert not all(map(torch.equal, before, prefix_of(model)))
