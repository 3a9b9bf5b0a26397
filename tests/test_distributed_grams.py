"""Processes that add up Gram matrices where these are smaller than the correlations."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import batches, seeded
from processes import alone, distributed_test
from replicated import SIZE, NoNorm, Run, assert_equal, fixed
from torch import nn

from localsgd_ext import HebbianUpdater, reference
from localsgd_ext.distributed import ReplicatedModel, check_replicas


class Widening(nn.Module):
    """Layers of kernel size 1 that widen, the second of them in groups, the third without a bias, then one that narrows."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1, groups=2), nn.Conv2d(24, 60, 1, bias=False), nn.Conv2d(60, 5, 1)]
        )
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def triangle(n):
    return n * (n + 1) // 2


D = [3 * 8, 4 * 24, 24 * 60]
G = [triangle(3) + 3, 2 * triangle(4) + 8, triangle(24)]
"""Numbers to add up for the first three layers."""


@pytest.mark.parametrize("sync", ["step", 2, "epoch"])
@pytest.mark.parametrize(
    "options", [{}, {"refresh": 2}, {"momentum": 0.5}, {"sample": 0.5}, {"normalize": False, "lr": 1e-6}], ids=str
)
@distributed_test(world_size=2)
def test_equals_correlations(options, sync):
    """That ``D`` is reduced instead, of which other tests know that it equals one process with the whole batch."""
    by_gram, by_d = (
        Run(Widening, replicated=True, sync=sync, algorithm=algorithm, **options) for algorithm in ("gram", "direct")
    )
    for run in (by_gram, by_d):
        run.run()
    assert by_gram.model.traffic.correlations < by_d.model.traffic.correlations
    assert_equal(by_d, by_gram, rtol=1e-12, atol=1e-12)
    check_replicas(by_gram.local)


@pytest.mark.parametrize("algorithm", ["gram", "auto"])
@pytest.mark.parametrize("world_size", [2, 4])
@distributed_test()
def test_equals_one_process_with_the_whole_batch(world_size, algorithm):
    many, one = (Run(Widening, replicated=replicated, algorithm=algorithm).run() for replicated in (True, False))
    assert many.local._updater._sums.grams
    assert_equal(one, many, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_in_fp32_the_difference_is_rounding():
    many, one = (
        Run(Widening, replicated=replicated, algorithm="gram", dtype=torch.float32).run() for replicated in (True, False)
    )
    assert_equal(one, many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sync", "sums"), [("step", 5), (2, 3), ("epoch", 1)])
@distributed_test(world_size=2)
def test_traffic(sync, sums):
    """The first sum at a boundary is of ``D``: which algorithm computes it is agreed upon meanwhile."""
    run = Run(Widening, replicated=True, sync=sync, algorithm="gram", schedule=fixed(3))
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    for _ in range(2):
        before = run.model.traffic.correlations
        run.epoch(0, batches_per_epoch=5)
        run.model.flush()
        now = run.model.traffic.correlations - before
        first = 0 if before else 1
        assert now == 8 * (first * sum(D) + (sums - first) * sum(G) + 3 * sums)


@distributed_test(world_size=2)
def test_layers_that_narrow_or_are_no_gram_layers_send_correlations():
    run = Run(NoNorm, replicated=True, schedule=fixed(4))  # 3x3, 1x1 that widens, 1x1 that narrows, 3x3
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    hooks = run.local._updater._hooks
    for name in ("convs.1", "convs.2"):
        hooks[name].arguments = lambda hook=hooks[name], of=hooks[name].arguments: (
            of() | {"algorithm": hook.algorithm or "gram"}
        )
    run.epoch(0)
    run.model.flush()
    assert list(run.local._updater._sums.grams) == ["convs.1"]


@distributed_test(world_size=2)
def test_under_autocast_the_weight_is_the_rounded_one():
    results = []
    for algorithm in ("gram", "direct"):
        run = Run(Widening, replicated=True, dtype=torch.float32, schedule=fixed(3), algorithm=algorithm, lr=1.0)
        run.local.trace(torch.zeros(2, 3, 8, 8))
        for x, y in batches(3, SIZE):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                run.loss(x, y).backward()
        run.model.flush()
        check_replicas(run.local)
        results.append(run)
    layer = results[0].local._updater._sums._layers["convs.2"]
    assert layer.gram == torch.bfloat16
    weight = results[0].network.convs[2].weight.detach()
    sums = torch.rand(triangle(24)) + 1
    expected = layer.correlation_of(sums)
    gram = torch.zeros(24, 24)
    gram[torch.tril_indices(24, 24).unbind()] = sums
    gram = gram + gram.tril(-1).T
    torch.testing.assert_close(expected.view(60, 24), weight.view(60, 24).bfloat16().float() @ gram)
    for i in range(3):
        torch.testing.assert_close(results[0].network.convs[i].weight, results[1].network.convs[i].weight, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"sync": 2}, {"refresh": 2, "momentum": 0.5}], ids=str)
@distributed_test(world_size=2)
def test_resumes_bit_for_bit(options):
    """Also in an epoch whose boundary is that of the one before: what was agreed upon is in the state."""

    def run():
        boundaries = {"schedule": fixed(3)} if "refresh" not in options else {}
        return Run(Widening, replicated=True, **{"algorithm": "gram", **boundaries, **options})

    whole = run()
    saved = whole.run(stop=3).saved()
    whole.run(start=3)
    resumed = run().load(saved)
    assert resumed.local._updater._sums.grams
    resumed.run(start=3)
    for ours, theirs in zip(resumed.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@distributed_test(world_size=2)
def test_loads_what_one_process_saved_and_back():
    with alone():
        saved = Run(Widening, replicated=False, algorithm="gram", schedule=fixed(3)).run(stop=1).saved()
    many = Run(Widening, replicated=True, algorithm="gram", schedule=fixed(3)).load(saved).run(start=1, stop=3)
    check_replicas(many.local)
    with alone():
        one = Run(Widening, replicated=False, algorithm="gram", schedule=fixed(3)).load(many.saved()).run(start=3)
        whole = Run(Widening, replicated=False, algorithm="gram", schedule=fixed(3)).run()
    assert_equal(whole, one, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_after_a_state_that_does_not_say_what_is_summed_processes_agree_anew():
    with alone():
        saved = Run(Widening, replicated=False, algorithm="gram", schedule=fixed(3)).run(stop=1).saved()
    run = Run(Widening, replicated=True, algorithm="gram", schedule=fixed(3)).load(saved)
    for _ in range(2):
        assert not run.local._updater._sums.grams
        run.run(start=1, stop=2)
        assert len(run.local._updater._sums.grams) == 3
        run.load(saved)


@distributed_test(world_size=2)
def test_processes_with_different_numbers_of_threads_agree():
    torch.set_num_threads(1 + dist.get_rank())
    network = nn.Sequential(nn.Linear(300, 700), nn.ReLU(), nn.Linear(700, 4))
    model = ReplicatedModel(network)
    network[0].requires_grad_(False)
    updater = HebbianUpdater(model, ["0"], algorithm="gram")
    updater.enable(["0"])
    for _ in range(3):
        model(torch.randn(64, 300)).sum().backward()
    updater.flush()
    assert list(updater._sums.grams) == ["0"]
    check_replicas(model)


class Moody(nn.Module):
    """Runs its middle layer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 9), nn.Linear(9, 9, bias=False), nn.Linear(9, 4)
        self.times = 1

    def forward(self, x):
        x = F.relu(self.a(x))
        for _ in range(self.times):
            x = F.relu(self.b(x))
        return self.fc(x)


@pytest.mark.parametrize("sync", ["step", 2])
@distributed_test(world_size=2)
def test_what_comes_too_late_for_a_sum_is_what_the_next_one_is_of(sync):
    """Where the next one is of Gram matrices and this one of correlations; it is the next one's weight that they are multiplied by.
    Both processes see the same data."""
    model = ReplicatedModel(seeded(Moody).double(), bucket_bytes=1, sync=sync)
    a = model.module.a.requires_grad_(False)
    model.module.b.requires_grad_(False)
    updater = HebbianUpdater(model, ["a", "b"], lr=0.01, algorithm="gram")
    updater.enable(["a", "b"])
    weight, seen = a.weight.clone(), []
    for i, (x, _) in enumerate(batches(6, dtype=torch.float64)):
        first, second = x.flatten()[:24].view(6, 4), x.flatten()[24:32].view(2, 4)
        model.module.times = 1 if i in (0, 4) else 2
        model(first)
        seen.append(first)
        if (i + 1) % (1 if sync == "step" else sync) == 0:  # that was the present sum
            x = torch.cat(seen)
            d = reference.correlation(x, None, weight, bias=a.bias)
            weight += 0.01 * d / d.norm()
            seen = []
        a(second)  # after its bucket has left, if the sum was made
        seen.append(second)
    updater.flush()
    torch.testing.assert_close(a.weight, weight, rtol=1e-12, atol=1e-12)
    assert list(updater._sums.grams) == ["a", "b"]
    check_replicas(model)


@distributed_test(world_size=2)
def test_a_layer_that_the_optimizer_moves_sends_correlations():
    """By the time of the write its weight is another one."""
    model = ReplicatedModel(seeded(Moody).double())
    model.module.a.weight.requires_grad_(False)  # not its bias
    updater = HebbianUpdater(model, ["a", "b"], lr=0.01, algorithm="gram")
    updater.enable(["a", "b"])
    for _ in range(3):
        model(torch.randn(5, 4, dtype=torch.float64))
    assert not updater._sums.grams


CHANGES = {
    "a weight is clamped": (True, lambda run: run.network.convs[1].weight.clamp_(-0.05, 0.05)),
    "a bias is thawed": (True, lambda run: run.network.convs[1].bias.requires_grad_(True)),
    "behind a flush": (False, lambda run: (run.model.flush(), run.network.convs[1].weight.clamp_(-0.05, 0.05))),
    "of a layer that learns by SGD": (False, lambda run: run.network.convs[3].weight.clamp_(-0.05, 0.05)),
    "nothing": (False, lambda run: None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"sync": 2}, {"refresh": 3, "momentum": 0.5}], ids=str)
@distributed_test(world_size=2)
def test_what_changes_between_a_sum_and_its_product_is_said_once(change, options):
    said, action = CHANGES[change]
    run = Run(Widening, replicated=True, algorithm="gram", schedule=fixed(3), **options)
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for x, y in batches(9, SIZE, dtype=torch.float64):
            run.step(x, y)
            with torch.no_grad():
                action(run)
        run.model.flush()
    found = [str(warning.message) for warning in caught if "changed between" in str(warning.message)]
    assert [message.partition(" changed")[0] for message in found] == ["weight or bias of convs.1"] * said
    check_replicas(run.local)
