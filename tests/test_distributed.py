"""Several processes against one with the whole batch."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import TwoBlockResNet, batches, snapshot
from processes import distributed_test
from replicated import EPOCHS, SIZE, NoNorm, Run, assert_equal, fixed, share
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


@distributed_test(world_size=2)
def test_algorithm_1_moves_the_boundary_as_in_one_process():
    """By the norms that come out, at an alpha with which they hold it back where it might move."""
    boundaries = []
    for replicated in (True, False):
        run, path = Run(replicated=replicated, schedule="dynamic", t_shift=1, alpha=1.4, l_max=0.8), []
        for number in range(EPOCHS):
            run.epoch(number)
            path.append(run.local.boundary)
        boundaries.append(path)
    assert boundaries == [[0, 0, 1, 1, 1, 2]] * 2


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
