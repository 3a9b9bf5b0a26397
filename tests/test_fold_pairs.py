"""Which BatchNorm is folded into the layer before it, and which must not be."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fold_runs import DATA, Reads, folded, norm_passes
from models import PlainCNN, seeded
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning, freeze_prefix


@pytest.mark.parametrize(
    "how",
    [
        "",
        "skip",
        "out of sight",
        "in place before",
        "twice",
        "layer twice",
        "without gradients",
        "by its value",
        "custom",
        "kept",
        "returned",
    ],
)
def test_an_output_that_something_else_reads_is_not_folded(how: str) -> None:
    models = [seeded(lambda: Reads(how)).double() for _ in range(2)]
    x = DATA[0][0]
    handles = [freeze_prefix(m, 2, x, bn_stats=b) for m, b in zip(models, ("fold", "freeze"), strict=True)]
    expected = {"": {"conv1", "conv2"}, "layer twice": {"conv1"}}.get(how, {"conv2"})
    assert {layer for layer, _ in handles[0].plan.foldable.pairs} == expected
    torch.testing.assert_close(models[0](x), models[1](x), rtol=1e-12, atol=1e-12)


def test_what_a_hook_would_see_is_not_folded() -> None:
    x = DATA[0][0]
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any = None) -> None:
        seen.append(args[0] if output is None else output)

    for register in ("conv1.register_forward_hook", "bn1.register_forward_pre_hook"):
        where, method = register.split(".")
        early, late, plain = (seeded(lambda: Reads("")).double() for _ in range(3))
        getattr(getattr(early, where), method)(lambda *_: None)
        assert freeze_prefix(early, 2, x, bn_stats="fold").plan.foldable.pairs == (("conv2", "bn2"),)
        freeze_prefix(late, 2, x, bn_stats="fold")
        handle = getattr(getattr(late, where), method)(note)
        seen.clear()
        assert norm_passes(late, x) == 1
        torch.testing.assert_close(seen, [plain.conv1(x)], rtol=1e-12, atol=1e-12)
        handle.remove()
        assert norm_passes(late, x) == 0


def test_what_has_or_gets_another_forward_is_not_folded() -> None:
    x = DATA[0][0]
    early, late = (seeded(lambda: Reads("")).double() for _ in range(2))
    conv = early.conv1
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 3.0
    assert freeze_prefix(early, 1, x, bn_stats="fold").plan.foldable.pairs == (("conv2", "bn2"),)
    handle = freeze_prefix(late, 2, x, bn_stats="fold")
    late.conv1.forward = mine = lambda x: nn.Conv2d.forward(late.conv1, x) * 3.0
    assert norm_passes(late, x) == 1
    handle.set_boundary(2)
    handle.remove()
    assert vars(late.conv1)["forward"] is mine
    assert "forward" not in vars(late.bn1)


def test_modules_called_by_themselves() -> None:
    """BatchNorm hands through what its layer has just made, and nothing else."""
    model = seeded(lambda: Reads("")).double()
    x = DATA[0][0]
    freeze_prefix(model, 2, x, bn_stats="fold")
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = F.batch_norm(z, model.bn1.running_mean, model.bn1.running_var, model.bn1.weight, model.bn1.bias)
    model.conv1(x)
    torch.testing.assert_close(model.bn1(z), expected)


def test_a_thawed_parameter_gets_its_gradient() -> None:
    model = seeded(lambda: Reads("")).double()
    freeze_prefix(model, 2, DATA[0][0], bn_stats="fold")
    model.bn1.bias.requires_grad_(True)
    assert norm_passes(model, DATA[0][0]) == 1
    model(DATA[0][0]).sum().backward()
    assert model.bn1.bias.grad is not None


def test_channels_that_are_not_the_layers() -> None:
    """BatchNorm1d of three dimensions normalises the second, a linear layer makes the last."""
    model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Flatten(), nn.LazyLinear(4)).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert freeze_prefix(model, 1, x, bn_stats="fold").plan.foldable.pairs == ()


def test_a_graph_that_cannot_be_seen_is_said_once() -> None:
    class Hidden(PlainCNN):
        def forward(self, x: Tensor) -> Any:
            return iter([super().forward(x)])

    model = seeded(Hidden).double()
    with pytest.warns(
        UserWarning, match=r"bn_stats='fold' folds nothing.*output, of type list_iterator, shows no tensor"
    ) as said:
        freeze_prefix(model, 3, DATA[0][0], bn_stats="fold").set_boundary(2)
    assert len(said) == 1
    assert norm_passes(model, DATA[0][0]) == 4
    assert not folded(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_prefix(seeded(Hidden).double(), 3, DATA[0][0], bn_stats="freeze")


def test_the_hebbian_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bn_stats must be 'update' or 'freeze' with rule='hebbian', got 'fold'"):
        LocalizedLearning(seeded(PlainCNN), None, epochs=2, rule="hebbian", refresh=None, bn_stats="fold")
    LocalizedLearning(seeded(PlainCNN), None, epochs=9, refresh=None, bn_stats="fold").remove()
