"""What several processes decide together, and the first forward of each."""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from models import TwoBlockResNet, batches
from processes import distributed_test
from replicated import SIZE, NoNorm, Run, assert_equal, fixed
from torch import nn

from localsgd_ext.distributed import check_replicas


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
    run = Run(replicated=True, preset=None, rule="frozen", schedule="dynamic", alpha=100.0, t_shift=1, epochs=8)
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


@distributed_test(world_size=2)
def test_the_largest_norm_decides():
    run = Run(replicated=True)
    loss, norm, refusing = run.model.agree((1.0, 3.0)[dist.get_rank()], (0.5, 0.25)[dist.get_rank()])
    assert (loss, norm, refusing) == (2.0, 0.5, [])


@distributed_test(world_size=2)
def test_a_loss_that_one_process_refuses_raises_on_all_and_changes_nothing():
    run = Run(replicated=True)
    for x, y in batches(2, SIZE, dtype=torch.float64):
        run.step(x, y)
    before = run.local.state_dict()
    wrong, error, message = [(1.0, ValueError, "refused on rank 1"), (torch.zeros(2), ValueError, "one element")][
        dist.get_rank()
    ]
    with pytest.raises(error, match=message):
        run.local.step(wrong)
    assert run.local.state_dict() == before
    run.local.step(1.0)
    assert run.local.epoch == 1


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
