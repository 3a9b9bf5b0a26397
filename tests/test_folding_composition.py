"""A folded prefix in checkpoints, graphs, compiled models, transforms and several processes."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fold_runs import DATA, Reads, Run, assert_same, both, folded, load_larger
from models import PlainCNN, TwoBlockResNet, at, batches, changed, seeded, snapshot
from processes import distributed_test
from recorded_graph import RecordedGraphs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localsgd_ext import GraphedStep, LocalizedLearning, StaticModeSelection, freeze_prefix
from localsgd_ext.distributed import ReplicatedModel, check_replicas
from localsgd_ext.fold_pairs import NOT_SAVED
from localsgd_ext.folding import Fold


def test_a_resumed_run_folds_before_its_first_forward() -> None:
    whole = Run(PlainCNN, "fold", (2, 2, 3, 3))
    whole.epoch()
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict(), whole.local.state_dict()))
    whole.epoch()
    model = seeded(PlainCNN).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    schedule = StaticModeSelection(kind=lambda epoch: (2, 2, 3, 3)[min(epoch, 3)], l_max=1.0)
    local = LocalizedLearning(model, optimizer, epochs=4, schedule=schedule, rule="frozen", bn_stats="fold")
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    file = io.BytesIO()
    torch.save(saved[2], file)
    file.seek(0)
    local.load_state_dict(torch.load(file, weights_only=True))
    assert folded(model) == {"features.0", "features.3"}
    for x, y in DATA:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    local.step()
    assert not changed(model, snapshot(whole.model))


def test_a_state_from_before_there_was_folding() -> None:
    state = Run(PlainCNN, "freeze", (3, 3)).local.state_dict()
    del state["plan"]["foldable"]
    fresh = seeded(PlainCNN).double()
    local = LocalizedLearning(fresh, None, epochs=2, schedule=at(3), rule="frozen", bn_stats="fold")
    with pytest.warns(UserWarning, match=f"bn_stats='fold' folds nothing.*{NOT_SAVED.why_not}"):
        local.load_state_dict(state)
    assert not folded(fresh)
    known = Run(PlainCNN, "fold", (3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.local.load_state_dict(state)  # where a forward has been seen
    assert len(folded(known.model)) == 3
    assert known.local.plan.foldable.pairs is not None


def test_a_state_of_another_network_is_refused() -> None:
    run = Run(PlainCNN, "fold", (3, 3))
    state = run.local.state_dict()
    state["plan"]["foldable"]["pairs"] = [["features.0", "nowhere"]]
    with pytest.raises(ValueError, match="this one has no 'nowhere'"):
        run.local.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"refresh": 2}], ids=str)
def test_a_graphed_step(options: dict[str, Any]) -> None:
    """Replays read the folded tensors, which are written anew where something changes, without another capture."""
    fold, plain = (Run(TwoBlockResNet, "fold", (3, 3, 4, 2, 2, 2), **options) for _ in range(2))
    recorder = RecordedGraphs(fold.model.buffers())
    graphed = GraphedStep(fold.local, fold.step, warmup=2, recorder=recorder)
    for epoch in range(5):
        for number, (x, y) in enumerate(DATA * 2):
            assert torch.equal(graphed(x, y), plain.step(x, y)), (epoch, number)
            if number == 5 and epoch == 1:
                warm_ups = recorder.warm_ups
                load_larger(fold.model), load_larger(plain.model)
        fold.local.step()
        plain.local.step()
        if epoch == 1:
            assert recorder.warm_ups == warm_ups
    assert not changed(fold.model, snapshot(plain.model))


def test_a_bad_mini_batch_is_skipped_as_with_freeze() -> None:
    fold, freeze = both(PlainCNN, (2, 2, 2), nan_policy="skip")
    bad = DATA[1][0].clone()
    bad[0, 0, 0, 0] = float("nan")
    for run in (fold, freeze):
        for x in (DATA[0][0], bad, DATA[2][0]):
            run.step(x, DATA[0][1])
        assert run.local.skipped_steps == 1
    assert fold.local.kept_statistics == freeze.local.kept_statistics == {"features.7": 1, "features.10": 1}
    assert_same(fold, freeze)


def test_activation_checkpointing_of_the_prefix() -> None:
    class Checkpointed(PlainCNN):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(checkpoint(self.features, x, use_reentrant=False).mean((2, 3)))

    fold, freeze = both(Checkpointed, (2, 2, 3))
    assert len(fold.local.plan.foldable.pairs) == 4
    for _ in range(2):
        for got, expected in zip(fold.epoch(), freeze.epoch(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert_same(fold, freeze)


def test_torch_func_takes_the_weights_that_it_is_given() -> None:
    run = Run(PlainCNN, "fold", (4, 4))  # all norms: outside of the prefix they would count, which torch.func refuses
    x = DATA[0][0]
    state = {name: tensor.detach().clone() for name, tensor in run.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(run.model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(state)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if name.endswith("weight"))
    torch.testing.assert_close(run.model(x).square().sum(), loss(state))
    several = {name: torch.stack([tensor, 2.0 * tensor]) for name, tensor in state.items()}
    losses = torch.func.vmap(loss)(several)
    torch.testing.assert_close(losses, torch.stack([loss(state), loss({n: 2.0 * t for n, t in state.items()})]))


def _compiled(bn_stats: str, refresh: int | None, fullgraph: bool) -> tuple[Run, int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = Run(PlainCNN, bn_stats, (0, 0, 1, 3, 3, 2), refresh=refresh)
    run.forward = torch.compile(run.model, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(5):
        run.epoch()
    return run, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("refresh", [None, 2])
def test_compiled_as_often_as_freeze(refresh: int | None) -> None:
    (fold, compilations), (freeze, expected) = (_compiled(bn_stats, refresh, True) for bn_stats in ("fold", "freeze"))
    assert_same(fold, freeze)
    assert compilations == expected
    torch._dynamo.reset()


def test_a_first_forward_that_is_compiled_is_said_to_hide_what_reads_what() -> None:
    torch._dynamo.reset()
    model = seeded(PlainCNN)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalizedLearning(model, optimizer, epochs=9, schedule=at(3), bn_stats="fold")
    with pytest.warns(UserWarning, match=r"bn_stats='fold' folds nothing.*was compiled.*call trace\(\) before"):
        torch.compile(model, backend="eager")(batches(1)[0][0])
    local.step()
    assert not folded(model)
    torch._dynamo.reset()


def test_compiled_in_part() -> None:
    """One of the two modules in a graph, the other one not."""
    for part in ("conv1", "bn1"):
        torch._dynamo.reset()
        model, plain = (seeded(lambda: Reads("")).double() for _ in range(2))
        freeze_prefix(model, 2, DATA[0][0], bn_stats="fold")
        freeze_prefix(plain, 2, DATA[0][0], bn_stats="freeze")
        getattr(model, part).compile(backend="eager")
        for x, _ in DATA:
            torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@distributed_test(world_size=2)
def test_several_processes() -> None:
    """Replicas go by the first one's statistics, which every forward gives to the others; they are folded once an epoch."""
    folds: list[Fold] = []
    original = Fold._fold

    def counting(fold: Fold, *sources: Any) -> None:
        folds.append(fold)
        original(fold, *sources)

    Fold._fold = counting  # type: ignore[method-assign]
    models = []
    for bn_stats in ("fold", "freeze"):
        model = seeded(PlainCNN).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        whole = ReplicatedModel(model)
        local = LocalizedLearning(whole, optimizer, epochs=6, schedule=at(3), rule="frozen", bn_stats=bn_stats)
        for _ in range(3):
            for x, y in DATA:
                mine, labels = (t.chunk(2)[dist.get_rank()] for t in (x, y))
                optimizer.zero_grad()
                F.cross_entropy(whole(mine), labels).backward()
                optimizer.step()
            local.step()
        check_replicas(local)
        models.append(model)
    assert len(folds) == 2 * 3
    for name, expected in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name], expected, rtol=1e-12, atol=1e-12)
