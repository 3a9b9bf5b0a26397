"""Processes that differ: in what is not finite, in the number of batches, in their replicas."""

import pytest
import torch
import torch.distributed as dist
from models import batches, seeded, snapshot
from processes import distributed_test, raises_everywhere
from replicated import SIZE, NoNorm, Run, assert_equal, fixed, share

from localsgd_ext import LocalizedLearning
from localsgd_ext.distributed import ReplicatedModel, check_replicas


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
    "local momentum of convs.0": lambda run: run.local._updater._step._velocity["convs.0"].mul_(2),
    "mini-batches since the last refresh": lambda run: run.local._refresher.refresh.advance(run.local.epoch),
    "parameters frozen by the boundary": lambda run: run.local.keep_frozen([run.network.convs[0].bias]),
    "sign": lambda run: setattr(run.local.supervision, "sign", -run.local.sign),
}


@pytest.mark.parametrize("what", PLANTED)
@distributed_test(world_size=4)
def test_a_difference_is_found_and_not_repaired(what):
    run = Run(replicated=True, momentum=0.5, refresh=4).run(stop=3)
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
    assert run.local.boundary == run.local.schedule.boundary
    assert run.local.epoch == run.local.schedule.epoch
    for parameter in run.network.parameters():  # put right, the epoch ends as it would have
        dist.broadcast(parameter.data, 0)
    for state in run.optimizer.state.values():
        dist.broadcast(state["momentum_buffer"], 0)
    boundary, epoch = run.local.boundary, run.local.epoch
    run.local.step(1.0)
    assert run.local.boundary == run.local.schedule.boundary != boundary
    assert run.local.epoch == epoch + 1
