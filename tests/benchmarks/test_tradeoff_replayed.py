"""benchmarks/tradeoff_replayed.py: an epoch that starts from kept outputs is one of the whole network, but for what it skips."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.tradeoff import Run, Way
from benchmarks.tradeoff_replayed import Outputs
from localsgd_ext.train import config, data


@pytest.fixture(scope="module")
def pictures() -> data.Data:
    flags: dict[str, Any] = {"train_size": 96, "test_size": 32, "channels_last": True}
    return data.load(config.resolve("glyphs", "small_vgg", "sgd", None, **flags))


def test_which_epochs_are_replayed(pictures: data.Data) -> None:
    outputs = Outputs(Run(Way(), 0, 4, 0.03, pictures, "small_vgg").model)
    z = (torch.zeros(2), torch.zeros(2))
    begun = []
    for modules in (0, 3, 3, 6, 6, 9):
        begun.append(outputs.begin_epoch(modules, 1))
        outputs._kept = [] if modules == 0 else [z]
    assert begun == [0, 0, 3, 0, 6, 0]  # every second one, from where the prefix ended when its outputs were kept
    assert outputs.begin_epoch(6, 1) == 0  # the prefix has become shorter: some of what is skipped would learn
    outputs._kept = [z]
    assert [outputs.begin_epoch(6, 1), outputs.begin_epoch(6, 3)] == [6, 0]


@pytest.mark.parametrize("model", ["small_vgg", "small_resnet"])
def test_a_replayed_step_is_the_whole_network_s(model: str, pictures: data.Data) -> None:
    ours, whole = (Run(Way("jump", l_max=0.5, replays=replays), 0, 4, 0.03, pictures, model) for replays in (1, 0))
    ours.model.train()
    whole.model.train()
    boundary = ours.boundary(0)
    modules = ours._whole_modules(boundary)[0]
    assert modules > 1
    assert ours._outputs.begin_epoch(modules, 1) == 0
    for x, y in ours._outputs.keep(pictures.train(0)):
        ours._step(x, y, 0, boundary)
        whole._step(x, y, 0, boundary)
    seen = [(x, y) for x, y in pictures.train(0)]
    assert ours._outputs.begin_epoch(modules, 1) == modules
    replayed = list(ours._outputs.batches(Random(0)))
    assert sorted(torch.cat([y for _, y in replayed]).tolist()) == sorted(torch.cat([y for _, y in seen]).tolist())
    assert not all(torch.equal(one, other) for (_, one), (_, other) in zip(replayed, seen, strict=True))
    assert [len(y) for _, y in replayed] == [len(y) for _, y in seen]

    # Of the first mini-batch of that epoch: the prefix has not moved, so it would put out the same again.
    z, y = ours._outputs._kept[0]
    assert torch.equal(y, seen[0][1])
    skipped = nn.Sequential(*list(ours.model)[:modules])
    running = copy.deepcopy(skipped.state_dict())
    cost = ours._step(z, y, 0, boundary, modules)
    expected = whole._step(seen[0][0], y, 0, boundary)
    for mine, theirs in zip(ours.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert all(torch.equal(running[name], value) for name, value in skipped.state_dict().items())
    assert expected - cost == sum(out.numel() * weight[0].numel() for out, weight in forward_of(skipped, seen[0][0]))


def forward_of(prefix: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of its layers, what each puts out, and its weight."""
    found: list[tuple[Tensor, Tensor]] = []
    for module in prefix.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: found.append((out, m.weight)))
    with torch.no_grad():
        prefix(x)
    return found


def test_a_run_costs_less(pictures: data.Data) -> None:
    ways = {n: Run(Way("jump", l_max=0.9, start=0.25, replays=n), 0, 4, 0.03, pictures, "small_vgg").train() for n in (0, 1, 9)}
    costs = [ways[n]["multiply_adds"] for n in (0, 1, 9)]
    first, kept, replayed = costs[0] - costs[2], costs[0] - costs[1], costs[2]
    assert first == 2 * kept  # two epochs of four are replayed, or one
    assert replayed > 0
    assert kept > 0
