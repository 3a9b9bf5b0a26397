"""Which correlations are summed over processes, when, and when the weights are written."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import batches, seeded, twice_used
from processes import alone, distributed_test
from replicated import SIZE, Run, fixed, share
from torch import nn

from localsgd_ext import HebbianUpdater, LocalizedLearning, StaticModeSelection, ops, reduction, reference
from localsgd_ext.distributed import ReplicatedModel, check_replicas


@distributed_test(world_size=2)
def test_reductions_start_while_the_forward_goes_on():
    run = Run(replicated=True, schedule=fixed(3), bucket_bytes=1)  # a bucket per layer
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    assert run.model.reducer.num_buckets == 3
    events, x = [], torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    for i, conv in enumerate(run.network.convs):
        conv.register_forward_pre_hook(lambda *_, i=i: events.append(f"layer {i}"))
    all_reduce = dist.all_reduce
    reduction.dist.all_reduce = lambda *args, **kwargs: events.append("reduce") or all_reduce(*args, **kwargs)
    try:
        run.model(x)
        first, events[:] = list(events), []
        run.model(x)
    finally:
        reduction.dist.all_reduce = all_reduce
    assert first == ["layer 0", "layer 1", "layer 2", "layer 3", "reduce", "reduce", "reduce"]  # repeats are not known yet
    assert events == ["layer 0", "reduce", "layer 1", "reduce", "layer 2", "reduce", "layer 3"]


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (1, [["a"], ["b"], ["d"], ["c"]]),
        (300, [["a", "b"], ["d"], ["c"]]),  # "d" is float64
        (1 << 20, [["a", "b"], ["d"], ["c"]]),
        (200, [["a"], ["b"], ["d"], ["c"]]),
    ],
)
@distributed_test(world_size=2)
def test_buckets(bucket_bytes, expected):
    """Closed when full and where the dtype changes; layers that run several times come last; summed whatever they hold."""
    reducer = reduction.CorrelationReducer(None, bucket_bytes=bucket_bytes)
    weights = {"a": torch.zeros(5, 10), "b": torch.zeros(4, 5, 2), "c": torch.zeros(7), "d": torch.zeros(3).double()}
    reducer.bind(weights, held={"c"})
    assert [list(bucket.sums) for bucket in reducer._buckets] == expected
    for turn in range(2):
        reducer.begin_forward()
        for name in ("a", "c", "d", "c"):  # never "b"
            reducer.add(name, torch.full_like(weights[name], 1.0 + dist.get_rank()))
        reducer.end_forward()
        sums = {each.name: each for each in reducer.take()}
        assert {name: float(each.runs) for name, each in sums.items()} == {"a": 2, "b": 0, "c": 4, "d": 2}
        for name, total in (("a", 3.0), ("b", 0.0), ("c", 6.0), ("d", 3.0)):
            assert torch.equal(sums[name].total, torch.full_like(weights[name], total))
        reducer.clear()
        assert reducer.reduced_bytes == (turn + 1) * (4 * (50 + 40 + 7 + 3) + 8 * (3 + 1))


@distributed_test(world_size=2)
def test_what_comes_after_its_bucket_has_left_counts_in_the_next_sum():
    reducer = reduction.CorrelationReducer(None)
    reducer.bind({"a": torch.zeros(5)})
    runs = []
    for times in (1, 2, 1):
        reducer.begin_forward()
        for _ in range(times):
            reducer.add("a", torch.ones(5))
        reducer.end_forward()
        [summed] = reducer.take()
        runs.append((float(summed.runs), summed.total.tolist()))
        reducer.clear()
    assert runs == [(2, [2.0] * 5), (2, [2.0] * 5), (4, [4.0] * 5)]


class Moody(nn.Module):
    """Runs its middle layer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 4)
        self.times = 1

    def forward(self, x):
        x = F.relu(self.a(x))
        for _ in range(self.times):
            x = F.relu(self.b(x))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@distributed_test(world_size=2)
def test_processes_may_differ_in_which_layers_run(momentum):
    """The first skips the layer now and then and the second runs it twice: no mismatch, and all make the same step."""
    model = ReplicatedModel(seeded(Moody).double(), bucket_bytes=1)
    updater = HebbianUpdater(model, ["a", "b", "c"], lr=0.01, momentum=momentum)
    updater.enable(["a", "b", "c"])
    for times in [(1, 1), (1, 1), (0, 1), (1, 1), (1, 2), (1, 1), (0, 0), (2, 1)]:
        before = model.module.b.weight.clone()
        model.module.times = times[dist.get_rank()]
        model(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        updater.flush()
        check_replicas(model)
        assert torch.equal(model.module.b.weight, before) == (times == (0, 0))
    assert updater.skipped() == {}  # a layer that no process ran has skipped no update


@pytest.mark.parametrize("alone_too", [False, True], ids=["traced", "updater alone"])
@distributed_test(world_size=2)
def test_layers_that_run_twice_make_one_step(alone_too):
    results = []
    for replicated in (True, False):
        network = seeded(twice_used).double()
        model = ReplicatedModel(network, bucket_bytes=1) if replicated else network
        with alone():
            if alone_too:
                HebbianUpdater(model, ["a", "middle.conv"], lr=0.01).enable(["a", "middle.conv"])
            else:
                schedule = StaticModeSelection(kind=lambda epoch: 2, l_max=0.8)
                local = LocalizedLearning(model, None, epochs=4, preset="paper", lr=0.01, schedule=schedule)
                local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        for x, y in batches(4, SIZE, dtype=torch.float64):
            model(share(x, y)[0] if replicated else x)
        results.append(network.eval()(batches(1, 2, dtype=torch.float64)[0][0]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_all_take_the_first_processs_algorithm():
    chosen = "direct" if dist.get_rank() == 0 else "library"
    plan = ops.plan

    class Chosen:
        pick = chosen

    asked = []
    ops.plan = lambda *args, **kwargs: asked.append(plan(*args, **kwargs)) or Chosen
    run = Run(replicated=True)
    run.run(stop=3)
    hooks = [run.local._updater._hooks[name] for name in run.local.local_layers]
    assert [hook.arguments()["algorithm"] for hook in hooks] == ["direct"] * 3
    assert len(asked) == (2 + 3 if dist.get_rank() == 0 else 0)  # once for each layer and boundary (2, then 3)


# ---- sums over several forwards


def prefix_by_hand(network, data, windows, lr):
    """Weights of the first three convolutions after normalised steps along sums of D over windows of mini-batches."""
    weights = [conv.weight.detach().clone() for conv in network.convs]
    biases = [conv.bias.detach() for conv in network.convs]
    data = iter(data)
    for window in windows:
        sums = [torch.zeros_like(weight) for weight in weights[:3]]
        for x, _ in (next(data) for _ in range(window)):
            for i, total in enumerate(sums):
                padding = weights[i].shape[-1] // 2
                z = F.conv2d(x, weights[i], biases[i], padding=padding)
                total += reference.correlation(x, z, weights[i], padding=padding)
                x = F.relu(z)
        for weight, total in zip(weights, sums, strict=False):
            weight += lr * total / total.norm()
    return weights[:3]


@pytest.mark.parametrize(
    ("sync", "windows"),
    [("step", [1] * 7), (1, [1] * 7), (3, [3, 3, 1]), (10, [7]), ("epoch", [7])],
)
@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@distributed_test(world_size=2)
def test_sums_over_forwards_make_one_step(algorithm, sync, windows):
    run = Run(replicated=True, sync=sync, schedule=fixed(3), algorithm=algorithm)
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    data = batches(7, SIZE, dtype=torch.float64)
    expected = prefix_by_hand(run.network, data, windows, lr=0.01)
    before = run.model.traffic
    for x, y in data:
        run.step(x, y)
    run.local.step(1.0)
    for weight, conv in zip(expected, run.network.convs, strict=False):
        torch.testing.assert_close(conv.weight, weight, rtol=1e-12, atol=1e-12)
    check_replicas(run.local)
    numbers = sum(weight.numel() + 1 for weight in expected)  # and how often each layer ran
    trained = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    traffic = run.model.traffic
    assert (traffic.steps, before.steps) == (7, 0)
    if algorithm == "direct":
        assert traffic.correlations == len(windows) * numbers * 8
    assert traffic.gradients == 7 * trained * 8
    assert traffic.per_step == (traffic.correlations + traffic.gradients) / 7


USES = {
    "evaluation": lambda run: run.model.eval()(torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
    "evaluation of the network": lambda run: run.network.eval()(torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
    "no_grad": lambda run: torch.no_grad()(run.model)(torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
    "state_dict of the network": lambda run: run.network.state_dict(),
    "state_dict of the wrapper": lambda run: run.model.state_dict(),
    "state_dict of localized learning": lambda run: run.local.state_dict(),
    "flush": lambda run: run.model.flush(),
    "check_replicas": lambda run: check_replicas(run.local),
    "remove": lambda run: run.local.remove(),
}


@pytest.mark.parametrize("sync", ["step", 5, "epoch"])
@pytest.mark.parametrize("use", USES)
@distributed_test(world_size=2)
def test_whatever_waits_is_written_before_the_next(use, sync):
    run = Run(replicated=True, sync=sync, schedule=fixed(3))
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    data = batches(1, SIZE, dtype=torch.float64)
    expected = prefix_by_hand(run.network, data, [1], lr=0.01)
    run.step(*data[0])
    USES[use](run)
    for weight, conv in zip(expected, run.network.convs, strict=False):
        torch.testing.assert_close(conv.weight, weight, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_a_mini_batch_through_the_prefix_finds_nothing_waiting():
    run = Run(replicated=True, sync="epoch", schedule=fixed(3), refresh=3)
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    data = batches(3, SIZE, dtype=torch.float64)
    expected = prefix_by_hand(run.network, data, [2], lr=0.01)
    for x, y in data[:2]:
        run.step(x, y)
    seen = []
    run.network.convs[0].register_forward_pre_hook(lambda conv, _: seen.append(conv.weight.detach().clone()))
    assert run.local.refreshing
    run.step(*data[2])
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-12, atol=1e-12)
    check_replicas(run.local)
