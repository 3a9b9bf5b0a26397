"""Several processes against one with the whole batch."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import TwoBlockResNet, batches, snapshot
from processes import distributed_test
from replicated import SIZE, NoNorm, Run, assert_equal, fixed, share
from torch import nn
from torch.utils.checkpoint import checkpoint

from localsgd_ext import GraphedStep
from localsgd_ext.distributed import ReplicatedModel, check_replicas

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
def test_a_loss_that_only_one_process_knows_counts_for_all():
    """As where only the first one keeps a log; without a sign to set, the loss may be left out."""
    known = dist.get_rank() == 0
    run = Run(replicated=True, preset=None, schedule="dynamic", alpha=100.0, t_shift=1, epochs=8)
    boundaries = []
    for number, loss in enumerate([4.0, 3.8, 3.7, 3.6, 3.6]):
        for x, y in batches(2, SIZE, seed=number, dtype=torch.float64):
            run.step(x, y)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            run.local.step(loss if known else None)
        boundaries.append(run.local.boundary)
    assert boundaries == [0, 0, 0, 1, 1]
    check_replicas(run.local)


@distributed_test(world_size=2)
def test_a_loss_that_only_one_process_knows_sets_the_sign_of_all():
    """Missing everywhere it raises on all; either way nobody waits for a process that went another way."""
    run = Run(replicated=True)
    signs = []
    for number, loss in enumerate([1.0, 2.0, None, 1.5]):
        for x, y in batches(2, SIZE, seed=number, dtype=torch.float64):
            run.step(x, y)
        if loss is None:
            with pytest.raises(ValueError, match="epoch_loss"):
                run.local.step(None)
        else:
            run.local.step(loss if dist.get_rank() == 1 else None)
        signs.append(run.local.sign)
    assert signs == [1, -1, -1, 1]
    assert run.local.epoch == 3
    check_replicas(run.local)


@pytest.mark.parametrize("build", [NoNorm, TwoBlockResNet])
@distributed_test(world_size=2)
def test_a_boundary_above_zero_from_the_first_forward_on(build):
    """Traced by the user or not: the order of layers is found before that forward, and nothing is left of how."""
    runs = [Run(build, replicated=True, schedule=fixed(2)) for _ in range(2)]
    runs[0].local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    runs[1].model.eval()
    runs[1].model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))  # no training forward
    for run in runs:
        run.run(stop=2)
        assert run.local.boundary == 2
        assert run.model.traffic.steps == 6
    assert_equal(runs[0], runs[1], rtol=0, atol=0)
    if build is NoNorm:
        one = Run(replicated=False, schedule=fixed(2))
        one.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        assert_equal(one.run(stop=2), runs[1], rtol=1e-12, atol=1e-12)


class Sensitive(nn.Module):
    """Writes into its input, and has a BatchNorm that one sample is enough for in evaluation mode only."""

    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)
        self.modes = []

    def forward(self, x):
        self.modes.append((self.norm.training, self.hidden.training))
        return self.fc(self.norm(self.hidden(self.conv(x.sub_(0.5)).mean((2, 3)))))


@distributed_test(world_size=2)
def test_the_forward_before_the_first_leaves_modes_and_inputs_as_they_are():
    runs = [Run(Sensitive, replicated=True, schedule=fixed(2)) for _ in range(2)]
    x = batches(1, dtype=torch.float64)[0][0][:1]
    outputs = []
    for run, traced in zip(runs, (True, False), strict=True):
        run.network.norm.eval()
        if traced:  # by the user, with other pictures
            run.local.trace(batches(1, seed=1, dtype=torch.float64)[0][0])
        run.network.modes.clear()
        mine = x.clone()
        outputs.append(run.model(mine))
        assert torch.equal(mine, x - 0.5)
        assert run.network.modes == [(False, True)] * (1 if traced else 2)
    assert torch.equal(*outputs)


@distributed_test(world_size=2)
def test_the_first_forward_may_raise():
    run = Run(replicated=True, schedule=fixed(2))
    with pytest.raises(RuntimeError, match="channels"):
        run.model(torch.zeros(2, 5, 8, 8, dtype=torch.float64))
    run.run(stop=1)
    assert run.local.boundary == 2


@distributed_test(world_size=2)
def test_a_state_from_before_the_first_forward_is_traced_anew():
    run = Run(replicated=True, schedule=fixed(2))
    saved = run.saved()
    run.run(stop=1).load(saved)
    assert run.local.boundary == 0
    run.run(stop=1)
    assert run.local.boundary == 2
    check_replicas(run.local)


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
def test_what_the_user_freezes_is_out_of_all_reductions():
    """The weight and the bias of a layer, while the prefix is open; then one that the boundary has frozen already."""
    many, one = (Run(replicated=replicated, refresh=2, schedule=fixed(3)) for replicated in (True, False))
    for run in (many, one):
        run.local.trace(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        run.step(*batches(1, SIZE, dtype=torch.float64)[0])
        assert run.local.refreshing
        run.network.state_dict()  # so that what waits is written
        frozen = [*run.network.convs[1].parameters(), run.network.convs[0].weight]
        before = [parameter.detach().clone() for parameter in frozen]
        run.network.convs[1].requires_grad_(False)
        run.epoch(0)
        assert not run.local.refreshing
        assert run.local.local_layers == ("convs.0", "convs.2")
        moved = [not torch.equal(*pair) for pair in zip(frozen, before, strict=True)]
        assert moved == [False, False, True]
        run.local.keep_frozen(frozen[2:])
        before = [parameter.detach().clone() for parameter in frozen]
        run.epoch(1)
        assert all(map(torch.equal, frozen, before))
    assert_equal(one, many, rtol=1e-12, atol=1e-12)
    check_replicas(many.local)


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
def test_a_graphed_step_is_refused():
    run = Run(replicated=True)

    class NoRecorder:
        """Were it needed: this machine may have no GPU."""

    with pytest.raises(
        ValueError, match="local must be of a network in one process in a CUDA graph, got one of a ReplicatedModel"
    ):
        GraphedStep(run.local, run.step, recorder=NoRecorder())


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
