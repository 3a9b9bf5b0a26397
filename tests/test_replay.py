"""Epochs that begin where a frozen prefix ends: every step is the one that the whole network would make, but for what it skips."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Attention, PlainCNN, Separable, TwoBlockResNet, ViTLike, at, batches, conv4, seeded, twice_used
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning, ReplayLoader, StaticModeSelection
from localsgd_ext.prefix_cut import _OVERRIDE

BUDGET = 2**24


def learning(model: nn.Module, boundary: Any, **options: Any) -> tuple[torch.optim.Optimizer, LocalizedLearning]:
    """``boundary``: from the second epoch on, or one for each epoch."""
    schedule = (
        at(boundary)
        if isinstance(boundary, int)
        else StaticModeSelection(kind=lambda epoch: boundary[min(epoch, len(boundary) - 1)], l_max=0.99)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return optimizer, LocalizedLearning(model, optimizer, epochs=9, schedule=schedule, min_loss_drop=None, **options)


def epoch(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    data: Any,
    local: LocalizedLearning | None = None,
    context: Any = None,
) -> list[Any]:
    """Trains, with the forwards in ``context``; returns the mini-batches as the loader gave them."""
    seen = []
    for x, y in data:
        optimizer.zero_grad(set_to_none=True)
        with context or contextlib.nullcontext():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        seen.append((x, y))
    if local is not None:
        local.step(1.0)
    return seen


def in_replay(
    model: nn.Module, boundary: int, data: Any, context: Any = None, **options: Any
) -> tuple[torch.optim.Optimizer, ReplayLoader]:
    """After an epoch of SGD and the one in which the outputs are kept."""
    optimizer, local = learning(model, boundary, **options)
    loader = ReplayLoader(data, local, memory_budget=BUDGET)
    epoch(model, optimizer, loader, local, context)
    epoch(model, optimizer, loader, local, context)
    return optimizer, loader


def hooks(model: nn.Module) -> list[int]:
    return [len(hooks) for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def overridden(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if _OVERRIDE in vars(module)]


class Inplace(nn.Sequential):
    """What comes out of a BatchNorm is overwritten by what follows."""

    def __init__(self) -> None:
        body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
        super().__init__(*body, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


class Tokens(nn.Module):
    """Raw parameters and functions come before the cut, and write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block1, self.block2 = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 6), nn.Linear(6, 6)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).transpose(1, 2)], 1)
        x += self.position
        x = self.block1(x).relu_()
        return self.head(F.relu(self.block2(x)).mean(1))


class Shared(nn.Module):
    """One ReLU for all, one convolution called twice, an output that is no tensor, an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice, self.b, self.head = nn.Conv2d(3, 4, 3), conv4(), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.split, self.relu = Split(), nn.ReLU()

    def forward(self, *, pictures: Tensor) -> Tensor:
        one, other = self.split(self.relu(self.a(pictures)))["halves"]
        x = self.relu(self.twice(self.relu(self.twice(torch.cat([other, one], 1)))))
        return self.head(self.relu(self.b(x)).mean((2, 3)))


class Split(nn.Module):
    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"halves": (x[:, :2], x[:, 2:])}


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=4)


def densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), num_init_features=6, num_classes=4)


NETWORKS: list[tuple[Callable[[], nn.Module], int, str]] = [
    (PlainCNN, 2, "features.5"),
    (PlainCNN, 4, "features"),
    (TwoBlockResNet, 1, "bn"),
    (TwoBlockResNet, 2, "bn"),  # in the middle of a block
    (TwoBlockResNet, 3, "block1"),
    (TwoBlockResNet, 5, "block1"),
    (Separable, 3, "depthwise"),
    (ViTLike, 1, "patch"),
    (ViTLike, 3, "patch"),
    (Tokens, 1, "patch"),
    (Tokens, 2, "block1"),
    (Attention, 1, "embed"),
    (twice_used, 2, "middle"),
    (Inplace, 1, "2"),
    (resnet18, 3, "layer1.0"),
    (resnet18, 6, "layer1"),
    (densenet, 3, "features.pool0"),
    (densenet, 6, "features.transition1"),
]


@pytest.mark.filterwarnings("ignore:left out of localized learning")
@pytest.mark.parametrize(("build", "boundary", "cut"), NETWORKS)
def test_a_replayed_step_is_the_whole_network_s(build: Callable[[], nn.Module], boundary: int, cut: str) -> None:
    """To the bit, against a copy of the network that is given the pictures."""
    data = batches(3, 5) + batches(1, 3, seed=1)
    size = 32 if build in (resnet18, densenet) else 8
    data = [(F.interpolate(x, size=size), y) for x, y in data]
    model = seeded(build)
    optimizer, loader = in_replay(model, boundary, data)
    assert loader.begins_behind == cut
    pictures = {y: x for x, y in data}
    given = 0
    for z, y in loader:
        assert loader.replaying
        whole = copy.deepcopy(model)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(z), y)
        loss.backward()
        expected = F.cross_entropy(whole(pictures[y]), y)
        expected.backward()
        assert torch.equal(loss, expected)
        for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name  # type: ignore[arg-type]
        optimizer.step()
        given += 1
    assert given == 4


@pytest.mark.parametrize("bn_stats", ["update", "freeze", "fold"])
@pytest.mark.parametrize("autocast", [False, True])
def test_with_still_and_folded_norms_and_autocast(bn_stats: str, autocast: bool) -> None:
    data = batches(2)
    model = seeded(PlainCNN)
    context = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    optimizer, loader = in_replay(model, 3, data, context=context, bn_stats=bn_stats)
    before = [buffer.clone() for buffer in model.features[:9].buffers()]
    pictures = {y: x for x, y in data}
    for z, y in loader:
        assert z.dtype == (torch.bfloat16 if autocast else torch.float32)
        whole = copy.deepcopy(model)
        for module in whole.features[:9] if bn_stats != "update" else ():
            module.eval()
        with context:
            loss = F.cross_entropy(model(z), y)
        with context:
            expected = F.cross_entropy(whole(pictures[y]), y)
        # Folded convolutions are the others to rounding.
        rounding = 0.0 if bn_stats != "fold" else 1e-2 if autocast else 1e-5
        torch.testing.assert_close(loss, expected, rtol=rounding, atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.features[:9].buffers(), strict=True))
    assert model.features[10].num_batches_tracked == 6


def test_epochs_that_are_not_replayed_are_the_user_s_own() -> None:
    """The same weights, statistics and random numbers as without the loader, with dropout before and behind the cut."""

    def build() -> nn.Module:
        body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.Dropout(0.5)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 4))

    ended = []
    for with_loader in (True, False):
        model = seeded(build)
        optimizer, local = learning(model, [0, 1])
        data: Any = batches(3)
        if with_loader:
            data = ReplayLoader(data, local, memory_budget=BUDGET)
        epoch(model, optimizer, data, local)
        epoch(model, optimizer, data, local)
        ended.append((model.state_dict(), torch.random.get_rng_state()))
        if with_loader:
            epoch(model, optimizer, data, local)
            assert data.replaying
    assert torch.equal(ended[0][1], ended[1][1])
    for name, value in ended[1][0].items():
        assert torch.equal(ended[0][0][name], value) or name.startswith(("3", "6")), name


def test_an_argument_by_name_a_dictionary_and_an_output_that_is_no_tensor() -> None:
    model = seeded(Shared)
    data = [{"pictures": x, "labels": y} for x, y in batches(2)]
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(data, local, memory_budget=BUDGET)
    losses: list[list[float]] = []
    for _ in range(4):
        losses.append([])
        for batch in loader:
            loss = F.cross_entropy(model(pictures=batch["pictures"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        local.step(1.0)
    assert loader.replaying
    # The convolution that is called twice is frozen from its first call on; what comes behind its second one is what is left.
    assert loader.begins_behind == "a"
    assert sum(losses[-1]) < sum(losses[0])


def test_the_order_is_drawn_anew_and_every_mini_batch_comes_once() -> None:
    model = seeded(PlainCNN)
    data = batches(6, 2)
    optimizer, loader = in_replay(model, 2, data)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        given = [y for _, y in epoch(model, optimizer, loader)]
        orders.append([next(i for i, (_, y) in enumerate(data) if y is mine) for mine in given])
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(loader) == 6


def test_what_is_kept_is_of_the_first_epoch_at_a_boundary() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, [0, 2, 2, 2, 3, 3, 0, 0])
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    found = []
    for _ in range(8):
        epoch(model, optimizer, loader)
        found.append((local.boundary, loader.replaying, loader.begins_behind))
        local.step(1.0)
    cut2, cut3 = "features.5", "features.8"
    assert found == [
        (0, False, None), (2, False, cut2), (2, True, cut2), (2, True, cut2), (3, False, cut3), (3, True, cut3), (0, False, None),
        (0, False, None)
    ]  # fmt: skip
    assert loader.kept_bytes == 0


def _load_weights(model: Any, local: LocalizedLearning, loader: ReplayLoader) -> None:
    model.load_state_dict(model.state_dict())


def _thaw(model: Any, local: LocalizedLearning, loader: ReplayLoader) -> None:
    model.features[0].weight.requires_grad_(True)


def _forget(model: Any, local: LocalizedLearning, loader: ReplayLoader) -> None:
    loader.forget()


@pytest.mark.parametrize("change", [_load_weights, _thaw, _forget])
def test_what_may_have_changed_is_kept_anew(change: Callable[[Any, LocalizedLearning, ReplayLoader], None]) -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    for _ in range(3):
        epoch(model, optimizer, loader, local)
    assert loader.replaying
    change(model, local, loader)
    epoch(model, optimizer, loader, local)
    assert not loader.replaying


def test_an_epoch_that_is_broken_off_is_not_kept() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(3), local, memory_budget=BUDGET)
    epoch(model, optimizer, loader, local)
    before = hooks(model)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        break
    assert loader.kept_bytes == 0
    assert hooks(model) == before
    epoch(model, optimizer, loader)
    assert not loader.replaying
    epoch(model, optimizer, loader)
    assert loader.replaying


def test_a_mini_batch_that_the_user_leaves_out_is_not_kept() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(3), local, memory_budget=BUDGET)
    epoch(model, optimizer, loader, local)
    for number, (x, y) in enumerate(loader):
        if number != 1:
            F.cross_entropy(model(x), y).backward()
    assert len(epoch(model, optimizer, loader)) == 2
    assert loader.replaying


def test_within_an_epoch_the_network_may_be_evaluated_and_copied_and_called_twice() -> None:
    model = seeded(PlainCNN)
    optimizer, loader = in_replay(model, 2, batches(2))
    pictures = batches(1, seed=5)[0][0]
    for z, y in loader:
        average = copy.deepcopy(model)
        model.eval()
        average.eval()
        with torch.no_grad():
            assert torch.equal(model(pictures), average(pictures))
        model.train()
        (F.cross_entropy(model(z), y) + F.cross_entropy(model(z), y)).backward()
        assert overridden(model) == overridden(average) == []
        average.train()(pictures).sum().backward()  # a copy is not watched
        optimizer.step()


def test_nothing_is_left_behind() -> None:
    """Also where the forward fails."""
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    local.trace(batches(1)[0][0])
    before = hooks(model)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    for _ in range(3):
        epoch(model, optimizer, loader, local)
        assert hooks(model) == before
    assert loader.replaying
    handle = model.fc.register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        epoch(model, optimizer, loader)
    handle.remove()
    assert overridden(model) == []
    assert hooks(model) == before
    assert torch.overrides._get_current_function_mode() is None  # type: ignore[no-untyped-call]
    epoch(model, optimizer, loader)


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


class Concatenated(nn.Module):
    """The pictures themselves are read until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.cat([x, F.relu(self.a(x))], 1))
        y += F.pad(x, (0, 0, 0, 0, 0, 1))  # which a tensor without values would do nothing to
        return self.head(torch.cat([y, x], 1).mean((2, 3)))


class OnlyInPlace(Concatenated):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.pad(self.a(x), (0, 0, 0, 0, 0, 3)))
        y += F.pad(x, (0, 0, 0, 0, 0, 1))
        return self.head(F.pad(y, (0, 0, 0, 0, 0, 3)).mean((2, 3)))


@pytest.mark.parametrize("build", [Concatenated, OnlyInPlace])
def test_a_network_that_cannot_be_cut_is_trained_as_before(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    optimizer, local = learning(model, 1)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    epoch(model, optimizer, loader, local)
    with pytest.warns(
        UserWarning, match="no epoch at boundary 1 is replayed: what comes before the boundary does not end in a module"
    ):
        epoch(model, optimizer, loader, local)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        epoch(model, optimizer, loader, local)
    assert not loader.replaying


def test_a_budget_that_is_too_small_is_said() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    whole = 3 * (6 * 5 * 8 * 8 * 4 + 6 * 8)  # outputs and labels
    enough, short = (ReplayLoader(batches(3), local, memory_budget=budget) for budget in (whole, whole - 1))
    epoch(model, optimizer, enough, local)
    epoch(model, optimizer, enough)
    assert enough.kept_bytes == whole
    with pytest.warns(UserWarning, match=r"what the prefix puts out in an epoch takes 0\.0 MiB, more than memory_budget"):
        epoch(model, optimizer, short)
    assert short.kept_bytes == 0
    unsized = ReplayLoader(Unsized(), local, memory_budget=whole - 1)
    with pytest.warns(UserWarning, match="more than memory_budget"):
        epoch(model, optimizer, unsized)
    with pytest.raises(TypeError, match=r"object of type Unsized has no len\(\)"):
        len(unsized)


class Unsized:
    def __iter__(self) -> Iterator[Any]:
        return iter(batches(3))


def test_pictures_that_are_changed_on_their_way_are_noticed_in_the_first_epoch() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    doubled = (
        (lambda x: model(2 * x)),
        "no epoch at boundary 0 is replayed: the model must be called with a tensor of the mini-batch",
    )
    with pytest.warns(UserWarning, match=doubled[1]):
        epoch(doubled[0], optimizer, loader, local)
    epoch(model, optimizer, loader)
    said = "in an epoch that is replayed, the model must be called with a tensor of the mini-batch"
    with pytest.raises(RuntimeError, match=said):
        epoch(lambda z: model(z[:1]), optimizer, loader)


def test_pictures_that_are_only_moved_are_known() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET, device="cpu")
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.clone()), y).backward()
            optimizer.step()
        local.step(1.0)
    assert loader.replaying


def test_rebuilding_keeps_the_same_and_changes_nothing() -> None:
    data = batches(3) + batches(1, 2, seed=3)
    model = seeded(PlainCNN)
    optimizer, loader = in_replay(model, 2, data)
    torch.manual_seed(0)
    kept = {y: z.clone() for z, y in epoch(model, optimizer, loader)}
    before = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    loader.forget()
    with loader.rebuilding():
        for x, _ in loader:
            assert x.shape[1] == 3
            model(x)
    assert torch.equal(before[1], torch.random.get_rng_state())
    assert all(torch.equal(before[0][name], value) for name, value in model.state_dict().items())
    again = epoch(model, optimizer, loader)
    assert loader.replaying
    assert all(torch.equal(kept[y], z) for z, y in again)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_single_blocks_may_be_compiled() -> None:
    model = seeded(TwoBlockResNet)
    model.block1.compile(backend="eager")
    model.block2.compile(backend="eager")
    optimizer, loader = in_replay(model, 3, batches(2))
    assert loader.begins_behind == "block1"
    compiled = model.block1._compiled_call_impl
    epoch(model, optimizer, loader)
    assert loader.replaying
    assert model.block1._compiled_call_impl is compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("by_method", [False, True])
def test_a_network_that_is_compiled_as_a_whole_is_trained_as_before(by_method: bool) -> None:
    model: Any = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    loader = ReplayLoader(batches(2), local, memory_budget=BUDGET)
    local.trace(batches(1)[0][0])
    forward = model
    if by_method:
        model.compile(backend="eager")
    else:
        forward = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="not the network as a whole"):
        epoch(forward, optimizer, loader, local)
    with pytest.warns(UserWarning, match="no epoch at boundary 2 is replayed: .* not the network as a whole"):
        epoch(forward, optimizer, loader, local)
    epoch(forward, optimizer, loader, local)
    assert not loader.replaying


def test_arguments() -> None:
    model = seeded(PlainCNN)
    optimizer, local = learning(model, 2)
    data = batches(1)
    for loader, error, said in (
        (3, TypeError, "loader must be an iterable of mini-batches, got int"),
        (iter(data), TypeError, "loader must be an iterable that begins anew in every epoch, got list_iterator, an iterator"),
    ):
        with pytest.raises(error, match=said):
            ReplayLoader(loader, local, memory_budget=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="local must be a LocalizedLearning, got PlainCNN"):
        ReplayLoader(data, model, memory_budget=1)  # type: ignore[arg-type]
    for budget, error, said in (
        (True, TypeError, "memory_budget must be a number, got True"),
        (0, ValueError, "memory_budget must be above 0, got 0"),
        (math.nan, ValueError, "memory_budget must be above 0, got nan"),
    ):
        with pytest.raises(error, match=said):
            ReplayLoader(data, local, memory_budget=budget)
    local.remove()
    for options, what in (({"rule": "hebbian"}, 'rule="hebbian"'), ({"preset": "refresh"}, "a refresh")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learns = LocalizedLearning(model, optimizer, epochs=3, **options)
        with pytest.raises(ValueError, match=f"or there is nothing to keep: it has {what}"):
            ReplayLoader(data, learns, memory_budget=1)
        learns.remove()
