"""bn_stats="fold": what bn_stats="freeze" computes, with BatchNorm in the weights of the layer before it."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fold_runs import DATA, PATH, Mobile, Run, assert_same, both, folded, load_larger, norm_passes
from models import PlainCNN, TwoBlockResNet, at, changed, seeded, snapshot
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning, freeze_prefix
from localsgd_ext.layers import is_plain


@pytest.mark.parametrize("build", [PlainCNN, TwoBlockResNet, Mobile])
@pytest.mark.parametrize("options", [{}, {"refresh": 3}, {"nan_policy": "skip"}], ids=str)
def test_the_numbers_of_freeze_step_by_step(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    fold, freeze = both(build, **options)
    for epoch, _ in enumerate(PATH):
        for x, y in DATA:
            torch.testing.assert_close(fold.step(x, y), freeze.step(x, y), rtol=1e-12, atol=1e-12)
            assert_same(fold, freeze, epoch)
            with torch.no_grad():
                torch.testing.assert_close(fold.model.eval()(x), freeze.model.eval()(x), rtol=1e-12, atol=1e-12)
            fold.model.train(), freeze.model.train()
        fold.local.step()
        freeze.local.step()
    assert fold.local.boundary == freeze.local.boundary == PATH[-1]
    assert fold.local.kept_statistics == {}


@pytest.mark.parametrize(
    ("build", "norms", "by_boundary"),
    [
        (PlainCNN, 4, {0: 4, 1: 3, 3: 1, 4: 0}),
        (TwoBlockResNet, 6, {0: 6, 1: 5, 3: 3, 5: 1, 6: 0}),
        (Mobile, 8, {0: 8, 1: 7, 4: 4, 7: 1, 8: 0}),
    ],
)
def test_what_is_folded(build: Callable[[], nn.Module], norms: int, by_boundary: dict[int, int]) -> None:
    """Every BatchNorm of these networks is behind a layer; those of the prefix are not computed."""
    model = seeded(build).to(torch.float64)
    handle = freeze_prefix(model, 0, DATA[0][0], bn_stats="fold")
    assert len(handle.plan.foldable.pairs) == norms
    for boundary, passes in [*by_boundary.items(), *list(by_boundary.items())[::-1]]:
        handle.set_boundary(boundary)
        assert norm_passes(model, DATA[0][0]) == passes, boundary
    handle.set_boundary(2)
    assert len(folded(model)) == 2
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_order_found_in_the_first_training_forward_folds_too() -> None:
    model = seeded(Mobile).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalizedLearning(model, optimizer, epochs=4, schedule=at(4), bn_stats="fold")
    model(DATA[0][0])
    local.step()
    assert norm_passes(model, DATA[0][0]) == 4
    local.remove()
    assert norm_passes(model, DATA[0][0]) == 8
    assert not folded(model)


def test_a_refresh_has_the_true_parameters() -> None:
    run = Run(PlainCNN, "fold", (2, 2), refresh=2)
    assert not run.local.refreshing
    assert folded(run.model) == {"features.0", "features.3"}
    run.step(*DATA[0])
    assert run.local.refreshing
    assert folded(run.model) == set()
    F.cross_entropy(run.model(DATA[1][0]), DATA[1][1]).backward()
    assert all(p.grad is not None for p in run.model.parameters())


def test_gradients_of_the_input_pass_through() -> None:
    gradients = []
    for run in both(Mobile, (6, 6)):
        x = DATA[0][0].clone().requires_grad_()
        run.model(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def assert_unfolded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The classes' own forwards, of the model's own parameters: BatchNorm follows the data and all parameters get gradients."""
    assert not changed(model, expected)
    assert all(is_plain(module) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    model.requires_grad_(True)
    assert norm_passes(model.train(), DATA[0][0]) == 4
    model.zero_grad()
    model(DATA[0][0]).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {name for name in changed(model, expected) if "running_mean" in name} == {
        name for name in expected if "running_mean" in name
    }


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, lambda m: _pickled(copy.deepcopy(copy.deepcopy(m)))])
def test_copies_are_not_folded(copied: Callable[[nn.Module], nn.Module]) -> None:
    run = Run(PlainCNN, "fold", (3, 3))
    before, output = snapshot(run.model), run.model(DATA[0][0])
    copy_ = copied(run.model)
    with torch.no_grad():
        for p in copy_.parameters():
            p.add_(1.0)  # of the copy alone
    torch.testing.assert_close(run.model(DATA[0][0]), output, rtol=0, atol=0)
    with torch.no_grad():
        for p in copy_.parameters():
            p.sub_(1.0)
    copy_.load_state_dict(before)
    assert_unfolded(copy_, before)
    again = freeze_prefix(copied(run.model).requires_grad_(True), 2, DATA[0][0], bn_stats="fold")  # a model like any other
    assert len(again.plan.foldable.pairs) == 4
    assert norm_passes(run.model, DATA[0][0]) == 1


def test_the_users_model_is_as_it_was() -> None:
    run = Run(PlainCNN, "fold", (3, 3))
    plain = seeded(PlainCNN).double()
    run.model(DATA[0][0])
    assert run.model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in run.model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in run.model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert all(is_plain(run.model.get_submodule(name)) for name in run.local.layers)


def _assign(model: nn.Module) -> None:
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    frozen = [p.requires_grad for p in model.parameters()]
    model.load_state_dict(state, assign=True)
    for p, needs in zip(model.parameters(), frozen, strict=True):
        p.requires_grad_(needs)


def _data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def _strides(model: nn.Module) -> None:
    for i in (0, 3):
        weight = model.features[i].weight
        weight.data = weight.data.transpose(2, 3)  # at the same address


def _statistics(model: nn.Module) -> None:
    model.features[1].running_var.mul_(2.0)
    model.features[4].running_mean = model.features[4].running_mean + 1.0


def _affine(model: nn.Module) -> None:
    with torch.no_grad():
        model.features[1].weight.mul_(2.0)
        model.features[4].bias.add_(1.0)


def _eps(model: nn.Module) -> None:
    model.features[1].eps = 0.5


def _layout(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.features[3].weight.mul_(1.5)


@pytest.mark.parametrize("change", [load_larger, _assign, _data, _strides, _statistics, _affine, _eps, _layout])
def test_what_changes_is_folded_anew(change: Callable[[nn.Module], None]) -> None:
    fold, freeze = both(PlainCNN, (3, 3))
    x = DATA[0][0]
    before = fold.model(x)
    for run in (fold, freeze):
        change(run.model)
    after = fold.model(x)
    assert not torch.allclose(after, before, rtol=1e-6)
    torch.testing.assert_close(after, freeze.model(x), rtol=1e-12, atol=1e-12)
    assert norm_passes(fold.model, x) == 1


def test_an_address_means_the_same_tensor() -> None:
    """Memory that was folded is kept until it is folded anew: other values at its address would look like the old ones."""
    run = Run(PlainCNN, "fold", (3, 3))
    weight = run.model.features[3].weight
    values = weight.detach().numpy().copy()
    memory = weakref.ref(values)
    weight.data = torch.from_numpy(values)
    del values
    run.model(DATA[0][0])
    weight.data = torch.zeros_like(weight)
    assert memory() is not None
    run.model(DATA[0][0])
    assert memory() is None


def test_a_write_that_leaves_no_trace_is_seen_at_the_next_epoch_and_in_evaluation_at_once() -> None:
    fold, freeze = both(PlainCNN, (3, 3))
    x = DATA[0][0]
    for run in (fold, freeze):
        run.model(x)
        run.model.features[0].weight.data.mul_(3.0)
    torch.testing.assert_close(fold.model.eval()(x), freeze.model.eval()(x), rtol=1e-12, atol=1e-12)
    for run in (fold, freeze):
        run.model.train()
        run.local.step()
    torch.testing.assert_close(fold.model(x), freeze.model(x), rtol=1e-12, atol=1e-12)


def test_another_dtype_and_back() -> None:
    fold, freeze = both(PlainCNN, (3, 3))
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float32, 0.05)):
        x = DATA[0][0].to(dtype)
        got, expected = (run.model.to(dtype)(x) for run in (fold, freeze))
        assert got.dtype == expected.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=close, atol=close)


def test_autocast() -> None:
    fold, freeze = both(Mobile, (5, 5))
    x = DATA[0][0].float()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (run.model.float()(x) for run in (fold, freeze))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_folded_weights_keep_the_layout() -> None:
    run = Run(PlainCNN, "fold", (3, 3))
    x = DATA[0][0].contiguous(memory_format=torch.channels_last)
    run.model.to(memory_format=torch.channels_last)
    run.model(x)
    (fold, *_) = run.local._freeze._folds.values()
    weight, bias = fold.tensors()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.requires_grad
    assert not bias.requires_grad


def test_inference_mode_leaves_tensors_that_training_can_use() -> None:
    run = Run(PlainCNN, "fold", (3, 3))
    x = DATA[0][0].clone()
    with torch.inference_mode():
        run.model(x)
    run.model(x.requires_grad_()).sum().backward()
    assert x.grad is not None
