"""Attaching, removing, copying, exporting; what is reported."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from models import PlainCNN, TwoBlockResNet, at, batches, changed, run_epoch, seeded, snapshot, twice_used, with_boundary

from localsgd_ext import (
    DynamicModeSelection,
    HebbianUpdater,
    LocalizedLearning,
    StaticModeSelection,
    WeakSupervision,
    freeze_prefix,
    reference,
    trace_layers,
)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def updated_by_a_forward(model):
    before = snapshot(model)
    model.train()
    model(batches(1)[0][0])
    return changed(model, before) & {name for name, _ in model.named_parameters()}


def test_remove_takes_every_hook_off_and_gives_the_prefix_back():
    model = seeded(PlainCNN)
    model.features[4].weight.requires_grad_(False)  # the user's own
    optimizer = sgd(model)
    local = with_boundary(model, optimizer, 3, lr=0.1, bn_stats="freeze")
    assert updated_by_a_forward(model)
    local.remove()
    assert hooks(model) == 0
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"features.4.weight"}
    assert updated_by_a_forward(model) == set()
    before = snapshot(model)
    run_epoch(model, optimizer, batches(1))
    assert changed(model, before) >= {"features.0.weight", "features.1.weight", "features.1.bias", "features.3.weight"}
    local.remove()  # twice is harmless
    with pytest.raises(RuntimeError, match="remove"):
        local.step(1.0)


def test_remove_makes_the_deferred_updates_first():
    model = seeded(twice_used)
    local = with_boundary(model, sgd(model), 2, lr=0.1)
    before = snapshot(model)
    model(batches(1)[0][0])
    local.remove()
    assert changed(model, before) & {"a.weight", "middle.conv.weight"} == {"a.weight", "middle.conv.weight"}


@pytest.mark.parametrize("fail", [False, True])
def test_context_manager(fail):
    model = seeded(PlainCNN)
    optimizer = sgd(model)
    try:
        with LocalizedLearning(model, optimizer, epochs=20, preset="paper", schedule=at(2)) as local:
            local.step(run_epoch(model, optimizer, batches(1)))
            assert local.boundary == 2
            assert hooks(model) > 0
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    assert hooks(model) == 0
    assert all(p.requires_grad for p in model.parameters())


def test_removed_in_the_middle_of_a_failed_first_forward():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8, 8))  # wrong number of channels
    with pytest.raises(RuntimeError, match="forward"):
        local.step(1.0)
    run_epoch(model, sgd(model), batches(1))
    assert list(local.layers) == list(PlainCNN.LAYERS)
    local.remove()
    assert hooks(model) == 0


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(buffer, weights_only=False),
        "AveragedModel": torch.optim.swa_utils.AveragedModel(model).module,
    }


@pytest.mark.parametrize("removed", [False, True])
def test_copies_carry_no_live_hooks(removed):
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, lr=0.1, bn_stats="freeze")
    if removed:
        local.remove()
    before = snapshot(model)
    for how, other in copies(model).items():
        assert changed(other, before) == set(), how
        assert updated_by_a_forward(other) == set(), how
        assert changed(model, before) == set(), how
    if not removed:
        assert updated_by_a_forward(model) == {f"features.{i}.weight" for i in (0, 3, 6)}  # the original still learns


def test_a_copy_made_before_the_first_forward_is_not_traced():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper")
    copy.deepcopy(model)(batches(1)[0][0])
    with pytest.raises(RuntimeError, match="forward"):
        _ = local.layers


@pytest.mark.parametrize("removed", [False, True])
def test_export(removed):
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, lr=0.1)
    if removed:
        local.remove()
    model.eval()
    x = batches(1)[0][0]
    before = snapshot(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert changed(model, before) == set()


def test_boundary_move_callback():
    model = seeded(TwoBlockResNet)
    optimizer, moves = sgd(model), []
    local = LocalizedLearning(
        model,
        optimizer,
        epochs=20,
        preset="paper",
        schedule=StaticModeSelection(kind=lambda epoch: (0, 0, 2, 2, 3, 1)[epoch]),
        on_boundary_move=lambda old, new: moves.append((old, new, local.boundary)),
    )
    for _ in range(5):
        local.step(run_epoch(model, optimizer, batches(1)))
    assert moves == [(0, 2, 2), (2, 3, 3), (3, 1, 1)]


def test_warns_at_the_start_if_the_boundary_can_never_move():
    model = seeded(PlainCNN)  # L = 5, cap 3
    # K = floor(2 * 1 / 3.75) = 0, so 1: the first move is after epoch 1, which is the last of two.
    LocalizedLearning(model, sgd(model), epochs=2, preset="paper", t_shift=1)
    with pytest.warns(UserWarning, match="epochs"):
        model(batches(1)[0][0])


def test_does_not_warn_if_it_can():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=3, preset="paper", t_shift=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            local.step(run_epoch(model, sgd(model), batches(1)))


def test_nothing_is_known_before_the_first_training_forward():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper")
    model.eval()
    model(batches(1)[0][0])
    with torch.no_grad():
        model.train()(batches(1)[0][0])
    for ask in (lambda: local.step(1.0), lambda: local.layers, lambda: local.num_layers):
        with pytest.raises(RuntimeError, match="forward"):
            ask()
    assert local.boundary == 0


def test_trace_fixes_the_order_and_changes_nothing():
    model = seeded(TwoBlockResNet)
    local = LocalizedLearning(model, sgd(model), epochs=20, preset="paper", t_shift=1)
    before, state = snapshot(model), torch.get_rng_state()
    model.eval()
    local.trace(batches(1)[0][0])
    assert list(local.layers) == list(TwoBlockResNet.LAYERS)
    assert changed(model, before) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert list(trace_layers(model, batches(1)[0][0]).layers) == list(TwoBlockResNet.LAYERS)


def test_no_supervision_keeps_the_sign():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1, supervision=None)
    assert [(local.step(loss), local.sign)[1] for loss in (1.0, 2.0, 3.0)] == [1, 1, 1]
    local.step()


def test_a_supervision_of_ones_own():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1, supervision=WeakSupervision("toggle"))
    local.step(1e9)
    local.step(2e9)
    assert local.sign == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_leaves_local_weights_alone_and_is_reported(bad):
    model = seeded(TwoBlockResNet)
    local = with_boundary(model, sgd(model), 3, lr=0.1)
    weights = {f"{name}.weight" for name in local.local_layers}
    before = snapshot(model)
    x = batches(1)[0][0].clone()
    x[2, 1, 3, 3] = bad
    model(x)
    assert not changed(model, before) & weights
    assert local.skipped == {"stem": 1, "block1.conv1": 1, "block1.conv2": 1}
    with pytest.warns(UserWarning, match=r"skipped|statistics") as caught:
        local.step(1.0)
    messages = [str(w.message) for w in caught]
    skips = [m for m in messages if "skipped" in m]
    assert len(skips) == 1
    assert all(name in skips[0] for name in local.layers[:3])
    norms = [m for m in messages if "statistics" in m]
    assert len(norms) == 1
    assert all(name in norms[0] for name in ("bn", "block1.bn1", "block1.bn2"))
    assert not any(local.skipped.values()), "the counts are of the present epoch"


def test_skips_are_counted_and_a_good_batch_goes_on_learning():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1, lr=0.1)
    zero = torch.zeros(2, 3, 8, 8)  # D = 0 in the first layer
    for _ in range(3):
        model(zero)
    assert local.skipped == {"features.0": 3}
    assert updated_by_a_forward(model) == {"features.0.weight"}
    assert local.skipped == {"features.0": 3}
    with pytest.warns(UserWarning, match=r"features\.0.*3"):
        local.step(1.0)


def test_frozen_rule_freezes():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 3, rule="frozen")
    assert updated_by_a_forward(model) == set()
    assert local.skipped == {}


@pytest.mark.parametrize("bn_stats", ["update", "freeze"])
def test_batch_norm_statistics_of_the_prefix(bn_stats):
    model = seeded(PlainCNN)
    with_boundary(model, sgd(model), 2, bn_stats=bn_stats)
    before = snapshot(model)
    run_epoch(model, sgd(model), batches(1))
    statistics = {name for name in changed(model, before) if "running" in name}
    every = {f"features.{i}.running_{which}" for i in (1, 4, 7, 10) for which in ("mean", "var")}
    prefix = {name for name in every if name.startswith(("features.1.", "features.4."))}
    assert statistics == (every if bn_stats == "update" else every - prefix)
    assert all(module.training for module in model.modules())


def test_freeze_prefix_alone():
    model = seeded(TwoBlockResNet)
    optimizer = sgd(model)
    run_epoch(model, optimizer, batches(1))
    before = snapshot(model)
    handle = freeze_prefix(model, 3, batches(1)[0][0], optimizer=optimizer)
    assert changed(model, before) == set()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(("stem", "bn", "block1"))
    }
    assert all((p in optimizer.state) == p.requires_grad for p in model.parameters())
    run_epoch(model, optimizer, batches(1))
    trained = changed(model, before) & {n for n, _ in model.named_parameters()}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="boundary"):
        freeze_prefix(model, 7, batches(1)[0][0])


def test_a_schedule_made_for_another_depth_is_refused():
    model = seeded(PlainCNN)
    LocalizedLearning(model, sgd(model), epochs=20, preset="paper", schedule=DynamicModeSelection(9, 20, t_shift=1))
    with pytest.raises(ValueError, match="num_layers"):
        model(batches(1)[0][0])


def test_a_second_object_on_the_same_model_is_refused_until_the_first_is_removed():
    model = seeded(PlainCNN)
    local = with_boundary(model, sgd(model), 1)
    count = hooks(model)
    for second in (lambda: LocalizedLearning(model, sgd(model), epochs=20, preset="paper"), lambda: HebbianUpdater(model)):
        with pytest.raises(ValueError, match=r"under another (LocalizedLearning|updater).*remove"):
            second()
    assert hooks(model) == count
    another = copy.deepcopy(model)
    LocalizedLearning(another, sgd(another), epochs=20, preset="paper")
    local.remove()
    LocalizedLearning(model, sgd(model), epochs=20, preset="paper")


def test_updater_refuses_a_rate_that_would_overwrite_the_weights():
    model = seeded(PlainCNN)
    with pytest.raises(ValueError, match="lr must be finite, got nan"):
        HebbianUpdater(model, lr=float("nan"))
    assert hooks(model) == 0
    updater = HebbianUpdater(model, lr=0.1)
    with pytest.raises(ValueError, match="lr must be finite, got inf"):
        updater.set_lr(float("inf"))
    assert updater.lr == 0.1


def test_updater_refuses_names_it_does_not_know():
    model = seeded(PlainCNN)
    updater = HebbianUpdater(model)
    with pytest.raises(ValueError, match=r"features\.1"):
        updater.enable(["features.1"])
    with pytest.raises(ValueError, match="nothing"):
        HebbianUpdater(model, "nothing")


def test_a_users_hook_that_replaces_the_output_does_not_enter_the_correlation():
    """The update takes what the layer itself computed, in whatever order the hooks were registered."""
    model = seeded(PlainCNN)
    layer, seen = model.features[0], []

    def square(module, args, output):
        seen.append((args[0], output))
        return output.square()

    layer.register_forward_hook(square)
    with_boundary(model, sgd(model), 1, lr=0.1)
    expected = layer.weight.detach().clone()
    assert updated_by_a_forward(model) == {"features.0.weight"}
    reference.hebbian_update_(expected, *seen[-1], 0.1, padding=1)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_it_prints_says_where_it_is():
    model = seeded(PlainCNN)
    local = LocalizedLearning(model, sgd(model), epochs=5, schedule="linear")
    assert repr(local).startswith("LocalizedLearning(rule='frozen', boundary=0, epoch=0 of 5, schedule=StaticModeSelection(")
    run_epoch(model, sgd(model), batches(1))
    for _ in range(3):
        local.step()
    assert repr(local).startswith(f"LocalizedLearning(rule='frozen', boundary=2 of {local.num_layers} layers, epoch=3 of 5, ")
