"""Several processes against one with the whole batch."""

import copy
import io
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import TwoBlockResNet, batches, seeded, snapshot, twice_used
from processes import alone, distributed_test, raises_everywhere
from torch import nn
from torch.utils.checkpoint import checkpoint

from localsgd_ext import HebbianUpdater, LocalizedLearning, StaticModeSelection, ops, reduction, reference
from localsgd_ext.distributed import ReplicatedModel, check_replicas

EPOCHS, SIZE = 6, 8


class NoNorm(nn.Module):
    """Five layers without BatchNorm, whose statistics would differ from share to share: 3x3, 1x1 widening, 1x1, 3x3, linear."""

    def __init__(self):
        super().__init__()
        shapes = [(3, 4, 3), (4, 9, 1), (9, 5, 1), (5, 6, 3)]
        self.convs = nn.ModuleList(nn.Conv2d(c, k, size, padding=size // 2) for c, k, size in shapes)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.fc(x.mean((2, 3)))


def share(x, y, group=None):
    """This process's part of a mini-batch."""
    return tuple(t.chunk(dist.get_world_size(group))[dist.get_rank(group)] for t in (x, y))


def fixed(boundary):
    return StaticModeSelection(kind=lambda epoch: boundary, l_max=0.8)


class Run:
    """A run of a few epochs over moves of the boundary; ``replicated`` or in one process with all images."""

    def __init__(
        self, build=NoNorm, *, replicated, dtype=torch.float64, group=None, sync="step", bucket_bytes=400, ddp=None, **options
    ):
        self.replicated, self.group, self.to_none = replicated, group, True
        self.network = seeded(build).to(dtype)
        self.dtype = dtype
        self.model = self.network
        if replicated:
            self.model = ReplicatedModel(self.network, sync=sync, bucket_bytes=bucket_bytes, process_group=group, **(ddp or {}))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = StaticModeSelection(kind=lambda epoch: (0, 2, 3, 3, 1, 3, 3)[epoch], l_max=0.8)
        self.moves = []
        with alone():
            self.local = LocalizedLearning(
                self.model,
                self.optimizer,
                **{"epochs": EPOCHS, "preset": "paper", "schedule": schedule, "lr": 0.01, **options},
                on_boundary_move=lambda old, new: self.moves.append((old, new)),
            )

    def loss(self, x, y):
        return F.cross_entropy(self.model(x), y)

    def step(self, x, y):
        if self.replicated:
            x, y = share(x, y, self.group)
        loss = self.loss(x, y)
        self.optimizer.zero_grad(set_to_none=self.to_none)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self, number, batches_per_epoch=3):
        self.model.train()
        data = batches(batches_per_epoch, SIZE, seed=number, dtype=self.dtype)
        losses = [self.step(x, y) for x, y in data]
        self.local.step(sum(losses) / len(losses) + (number % 3 == 1))  # rises, so that the sign is negative at times

    def run(self, start=0, stop=EPOCHS):
        for number in range(start, stop):
            self.epoch(number)
        return self

    def saved(self):
        """A checkpoint, as bytes, through the safe loader."""
        state = {"local": self.local.state_dict(), "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, saved):
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.local.load_state_dict(state["local"])
        return self


def assert_equal(one, many, *, rtol, atol):
    assert (one.local.boundary, one.local.sign) == (many.local.boundary, many.local.sign)
    ours, theirs = many.network.state_dict(), one.network.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


VARIANTS = {
    "literal rule": {},
    "frozen": {"rule": "frozen"},
    "refresh": {"refresh": 2},
    "refresh of a frozen prefix": {"rule": "frozen", "refresh": 3},
    "momentum": {"momentum": 0.9},
    "un-normalised": {"normalize": False, "lr": 1e-6},
    "post-activation": {"activation": torch.relu},
}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@distributed_test()
def test_equals_one_process_with_the_whole_batch(variant, world_size):
    many = Run(replicated=True, **VARIANTS[variant]).run()
    one = Run(replicated=False, **VARIANTS[variant]).run()
    assert len(many.moves) == 4
    assert many.moves == one.moves
    assert_equal(one, many, rtol=1e-12, atol=1e-12)
    check_replicas(many.local)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("ddp", [{"gradient_as_bucket_view": True}, {"bucket_cap_mb": 1e-4}, {"static_graph": True}], ids=str)
@distributed_test(world_size=2)
def test_options_of_distributed_data_parallel(ddp, to_none):
    """Also where a gradient lies in the buckets of a wrapper that is not this mini-batch's."""
    runs = [Run(replicated=replicated, refresh=3, ddp=ddp if replicated else None) for replicated in (True, False)]
    for run in runs:
        run.to_none = to_none
        run.run()
    assert_equal(runs[1], runs[0], rtol=1e-12, atol=1e-12)


class Checkpointed(NoNorm):
    """One segment from the first layer to the last but one, so that the boundary always lies inside."""

    def forward(self, x):
        def segment(x):
            for conv in self.convs:
                x = F.relu(conv(x))
            return x

        return self.fc(checkpoint(segment, x, use_reentrant=False).mean((2, 3)))


@distributed_test(world_size=2)
def test_under_activation_checkpointing():
    """The recomputation sees the weights of the forward: they are written later."""
    many, plain, one = (
        Run(build, replicated=replicated).run()
        for build, replicated in ((Checkpointed, True), (NoNorm, True), (Checkpointed, False))
    )
    assert_equal(one, many, rtol=1e-12, atol=1e-12)
    assert_equal(plain, many, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_under_autocast_processes_agree():
    run = Run(replicated=True, dtype=torch.float32, schedule=fixed(3))
    run.local.trace(torch.zeros(2, 3, 8, 8))
    before = snapshot(run.network)
    for x, y in batches(3, SIZE):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.loss(*share(x, y)).backward()
    run.model.flush()
    check_replicas(run.local)
    moved = [(conv.weight - before[f"convs.{i}.weight"]).norm().item() for i, conv in enumerate(run.network.convs)]
    assert all(0.01 <= length <= 0.031 for length in moved[:3])
    assert moved[3] == 0


@distributed_test(world_size=2)
def test_in_fp32_the_difference_is_rounding():
    many, one = (Run(replicated=replicated, dtype=torch.float32).run() for replicated in (True, False))
    assert_equal(one, many, rtol=1e-4, atol=1e-5)


@distributed_test(world_size=2)
def test_with_batch_norm_processes_agree():
    """Each normalises by its own share, as with DistributedDataParallel: not what one process would do."""
    many = Run(TwoBlockResNet, replicated=True, refresh=2).run()
    check_replicas(many.local)
    many.model.eval()(torch.zeros(2, 3, 8, 8, dtype=torch.float64))  # evaluates with the first process's statistics
    check_replicas(many.local, buffers=True)


@distributed_test(world_size=2)
def test_shares_of_different_sizes_count_by_their_images():
    """Of the prefix, which depends on nothing but the pictures: gradients of the rest are averaged over processes."""
    weights = []
    for replicated in (True, False):
        run = Run(replicated=replicated, schedule=fixed(3))
        run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        for x, y in batches(4, SIZE, dtype=torch.float64):
            part = slice(None) if not replicated else slice(0, 7) if dist.get_rank() == 0 else slice(7, SIZE)
            run.loss(x[part], y[part]).backward()
        run.network.eval()(torch.zeros(1, 3, 8, 8, dtype=torch.float64))  # its next use writes it
        weights.append([run.network.convs[i].weight for i in range(3)])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- when a sum is made, and what of


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
            assert torch.equal(sums[name].correlation, torch.full_like(weights[name], total))
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
        runs.append((float(summed.runs), summed.correlation.tolist()))
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


@distributed_test(world_size=2)
def test_processes_may_differ_in_which_layers_run():
    """The first skips the layer now and then and the second runs it twice: no mismatch, and all make the same step."""
    model = ReplicatedModel(seeded(Moody).double(), bucket_bytes=1)
    updater = HebbianUpdater(model, ["a", "b", "c"], lr=0.01)
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
@distributed_test(world_size=2)
def test_sums_over_forwards_make_one_step(sync, windows):
    run = Run(replicated=True, sync=sync, schedule=fixed(3))
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


# ---- resuming


@pytest.mark.parametrize("options", [{}, {"refresh": 2, "momentum": 0.5}, {"sync": 2}], ids=str)
@distributed_test(world_size=2)
def test_resumes_bit_for_bit(options):
    whole = Run(replicated=True, **options)
    saved = whole.run(stop=3).saved()
    whole.run(start=3)
    resumed = Run(replicated=True, **options).load(saved).run(start=3)
    for ours, theirs in zip(resumed.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.local.boundary == whole.local.boundary


@pytest.mark.parametrize("options", [{}, {"refresh": 2}], ids=str)
@distributed_test(world_size=4)
def test_resumes_with_another_number_of_processes(options):
    """Two, then four, then one, against one throughout."""
    pair = dist.new_group([0, 1])
    saved = [b""]
    if dist.get_rank() < 2:
        saved = [Run(replicated=True, group=pair, **options).run(stop=3).saved()]
    dist.broadcast_object_list(saved, src=0)
    saved = Run(replicated=True, **options).load(saved[0]).run(start=3, stop=5).saved()
    last = Run(replicated=False, **options).load(saved).run(start=5)
    whole = Run(replicated=False, **options).run()
    assert_equal(whole, last, rtol=1e-12, atol=1e-12)


# ---- decisions


@distributed_test(world_size=2)
def test_signs_and_boundaries_come_from_all_processes():
    """Losses that rise on the first process and fall on the other; the dynamic schedule over enough epochs to move."""
    rank = dist.get_rank()
    run = Run(replicated=True, schedule="dynamic", alpha=100.0, t_shift=1, epochs=8)
    signs, expected = [], []
    for number, (here, there) in enumerate([(1, 9), (2, 7), (3, 7), (4, 5), (5, 5), (6, 3), (7, 3)]):
        for x, y in batches(2, SIZE, seed=number, dtype=torch.float64):
            run.step(x, y)
        run.local.step(float((here, there)[rank]))
        signs.append(run.local.sign)
        expected.append((here + there) / 2)
    rises = [1] + [-1 if b > a else 1 for a, b in itertools.pairwise(expected)]
    assert signs == rises
    assert set(signs) == {1, -1}
    assert run.local.boundary > 0
    assert run.local.supervision.last_loss == expected[-1]
    check_replicas(run.local)


@distributed_test(world_size=2)
def test_a_boundary_above_zero_from_the_first_forward_on():
    many, one = (Run(replicated=replicated, schedule=fixed(2)) for replicated in (True, False))
    for run in (many, one):
        run.local.trace(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        run.run(stop=2)
    assert_equal(one, many, rtol=1e-12, atol=1e-12)
    untraced = Run(replicated=True, schedule=fixed(2))
    assert "call trace() before" in raises_everywhere(RuntimeError, lambda: untraced.epoch(0))


# ---- trouble


@distributed_test(world_size=2)
def test_what_is_not_finite_on_one_process_alone_raises_on_all():
    """GradScaler keeps parameters finite; the loss is what is left, and the others must not wait for this process."""
    network = seeded(NoNorm)
    model = ReplicatedModel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    local = LocalizedLearning(model, optimizer, epochs=4, schedule=fixed(2), nan_policy="raise")
    local.trace(torch.zeros(2, 3, 8, 8))
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(FloatingPointError, match="the epoch loss is nan" if last else "not finite on rank 1"):
        local.step(float("nan") if last else 1.0)
    local.step(1.0)


@distributed_test(world_size=2)
def test_a_nan_on_one_process_poisons_none():
    run = Run(replicated=True, schedule=fixed(3), supervision=None)
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    data = batches(4, SIZE, dtype=torch.float64)
    spoiled = data[1][0].clone()
    spoiled[-1, 0, 0, 0] = float("nan")  # on the last process
    finite = []
    for x, y in [data[0], (spoiled, data[1][1]), data[2]]:
        before = snapshot(run.network)
        x, y = share(x, y)
        loss = run.loss(x, y)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        finite.append(all(p.grad.isfinite().all() for p in run.network.parameters() if p.requires_grad))
        if finite[-1]:  # gradients are averaged, so that all processes see that one of them is not finite
            run.optimizer.step()
        else:
            assert all(torch.equal(tensor, before[name]) for name, tensor in run.network.state_dict().items())
    assert finite == [True, False, True]
    assert run.local.skipped == {f"convs.{i}": 1 for i in range(3)}
    assert all(p.isfinite().all() for p in run.network.parameters())
    check_replicas(run.local)


@distributed_test(world_size=2)
def test_a_process_that_runs_out_of_batches_stops_all():
    run = Run(replicated=True, schedule=fixed(3), refresh=2)
    run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    data = batches(3 + dist.get_rank(), SIZE, dtype=torch.float64)

    def epoch():
        with run.model.join():
            for x, y in data:
                run.step(x, y)

    message = raises_everywhere(RuntimeError, epoch)
    assert "exhausted" in message


@distributed_test(world_size=2)
def test_loaders_of_one_length_pass_through_join():
    runs = [Run(replicated=True) for _ in range(2)]
    with runs[0].model.join():
        for x, y in batches(3, SIZE, dtype=torch.float64):
            runs[0].step(x, y)
    for x, y in batches(3, SIZE, dtype=torch.float64):
        runs[1].step(x, y)
    assert_equal(runs[1], runs[0], rtol=0, atol=0)


PLANTED = {
    "parameter convs.1.weight": lambda run: run.network.convs[1].weight.data[0, 0].add_(1e-15),
    "parameter convs.3.bias": lambda run: run.network.convs[3].bias.data.neg_(),
    "momentum_buffer of fc.weight": lambda run: run.optimizer.state[run.network.fc.weight]["momentum_buffer"].mul_(2),
    "local momentum of convs.0": lambda run: run.local._updater._velocity["convs.0"].mul_(2),
    "sign": lambda run: setattr(run.local.supervision, "sign", -run.local.sign),
}


@pytest.mark.parametrize("what", PLANTED)
@distributed_test(world_size=4)
def test_a_difference_is_found_and_not_repaired(what):
    run = Run(replicated=True, momentum=0.5).run(stop=3)
    check_replicas(run.local)
    if dist.get_rank() in (1, 3):
        PLANTED[what](run)
    before = snapshot(run.network)
    message = raises_everywhere(RuntimeError, lambda: check_replicas(run.local))
    assert f"{what} is not the same on rank 1, 3 as on rank 0" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.network.state_dict().items())


@distributed_test(world_size=2)
def test_drift_is_found_before_the_boundary_moves():
    run = Run(replicated=True)
    run.epoch(0)
    run.epoch(1)  # no move to 3 yet
    if dist.get_rank() == 1:
        run.network.fc.weight.data.mul_(1.5)
    message = raises_everywhere(RuntimeError, lambda: [run.epoch(number) for number in (2, 3)])
    assert "parameter" in message


# ---- the wrapper by itself


@distributed_test(world_size=2)
def test_gradients_accumulate_without_being_reduced():
    many, one = (Run(replicated=replicated, rule="frozen", schedule=fixed(2)) for replicated in (True, False))
    for run in (many, one):
        run.local.trace(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    (x, y), (u, v) = batches(2, SIZE, dtype=torch.float64)
    with many.model.no_sync():
        many.loss(*share(x, y)).backward()
    norms = many.model.gather([many.network.fc.weight.grad.norm().item()])
    assert norms[0] != norms[1]
    assert many.model.traffic.gradients == 0
    many.loss(*share(u, v)).backward()
    one.loss(x, y).backward()
    one.loss(u, v).backward()
    for ours, theirs in zip(many.network.parameters(), one.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_starts_with_the_first_processs_weights():
    torch.manual_seed(dist.get_rank())
    model = ReplicatedModel(NoNorm())
    check_replicas(model)
    torch.manual_seed(0)
    for ours, theirs in zip(model.module.parameters(), NoNorm().parameters(), strict=True):
        assert torch.equal(ours, theirs)


@distributed_test(world_size=2)
def test_wrappers_are_kept_while_the_prefix_opens_and_closes():
    run = Run(replicated=True, refresh=2)
    run.run(stop=2)  # the boundary is 3 by now
    run.epoch(2)
    kept = list(run.model._wrappers.values())
    assert len(kept) == 2
    assert not any(wrapper.find_unused_parameters for wrapper in kept)
    run.epoch(3)  # moves to 1 at its end
    run.step(*batches(1, SIZE, dtype=torch.float64)[0])
    assert len(run.model._wrappers) == 1
    assert not any(wrapper in kept for wrapper in run.model._wrappers.values())


@distributed_test(world_size=2)
def test_only_the_first_process_may_save():
    run = Run(replicated=True).run(stop=3)
    if dist.get_rank() == 0:
        assert len(run.saved()) > 1000
    run.run(start=3)
    check_replicas(run.local)


@distributed_test(world_size=2)
def test_a_compiled_network_gives_the_same_weights():
    warnings.filterwarnings("ignore", "The .grad attribute")  # read by torch.compile itself
    many, one = (Run(replicated=replicated) for replicated in (True, False))
    for run in (many, one):
        run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    many.network.compile(backend="eager")
    for run in (many, one):
        run.run(stop=4)
    assert_equal(one, many, rtol=1e-12, atol=1e-12)


@distributed_test(world_size=2)
def test_a_copy_of_the_network_takes_part_in_nothing():
    run = Run(replicated=True).run(stop=3)
    copied = copy.deepcopy(run.network).train()
    before = snapshot(copied)
    copied(torch.zeros(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())


@distributed_test(world_size=1)
def test_mistakes():
    with pytest.raises(TypeError, match="model must not be in a ReplicatedModel"):
        ReplicatedModel(ReplicatedModel(NoNorm()))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        ReplicatedModel(3)
    for sync in (0, -1, "never"):
        with pytest.raises(ValueError, match=f"sync must be 'step', 'epoch' or an int of at least 1, got {sync!r}"):
            ReplicatedModel(NoNorm(), sync=sync)
    for sync in (2.0, True, None):
        with pytest.raises(TypeError, match=f"sync must be 'step', 'epoch' or an int, got {sync!r}"):
            ReplicatedModel(NoNorm(), sync=sync)
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        ReplicatedModel(NoNorm(), bucket_bytes=0)
    with pytest.raises(TypeError, match=r"bucket_bytes must be an int, got 1\.5"):
        ReplicatedModel(NoNorm(), bucket_bytes=1.5)


def test_needs_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ReplicatedModel(NoNorm())
    with pytest.raises(RuntimeError, match="init_process_group"):
        check_replicas(NoNorm())
