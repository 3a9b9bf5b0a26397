"""When the batch grows, what follows it, and how it resumes, with numbers counted by hand."""

import math

import pytest
import torch
import torch.distributed as dist
from growing import AT_16, LAST, PARAMETERS, STOPPED, WHOLE_AT_16, FakeDevice, Run, network
from processes import distributed_test, raises_everywhere
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler

from localsgd_ext import BatchGrowth, LocalizedLearning, ResizableBatchSampler
from localsgd_ext.batch_growth import StepMemory
from localsgd_ext.distributed import check_replicas

# -------------------------------------------------------------------- when it grows


def test_the_numbers():
    assert (AT_16, WHOLE_AT_16) == (3504, 8368)


@pytest.mark.parametrize(("budget", "grows"), [(AT_16 - 1, False), (AT_16, True)])
def test_grows_when_the_boundary_has_freed_enough(budget, grows):
    run = Run(budget=budget, boundaries=(0, 0, 2))
    assert run.epochs(0, 4) == [False, grows, False, False]  # 32 would take 16 * 64 bytes more
    assert run.growth.batch_size == run.batch_sampler.batch_size == (16 if grows else 8)
    assert run.steps == [4, 4, *(2 * [2] if grows else 2 * [4])]
    assert run.growth.growths == grows
    assert run.growth.predicted == AT_16 + (STOPPED * 16 if grows else 0)


@pytest.mark.parametrize(("budget", "grows"), [(WHOLE_AT_16 - 1, False), (WHOLE_AT_16, True)])
def test_with_refresh_the_whole_steps_memory_decides(budget, grows):
    run = Run(budget=budget, boundaries=(0, 2), refresh=4)
    assert run.epoch(0) is grows
    assert run.local.boundary == 2
    assert run.growth.predicted == WHOLE_AT_16


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize(("allowed", "grows"), [(219, False), (220, True)])
def test_the_larger_of_the_two_kinds_decides(larger, allowed, grows):
    run = Run(budget=allowed, refresh=2, measure=lambda whole: StepMemory(20, 100 if whole is larger else 90, 8))
    assert run.epoch(0) is grows


def test_what_is_not_known_does_not_fit():
    run = Run(budget=math.inf, refresh=2, measure=lambda whole: None if whole else StepMemory(0, 1, 8))
    assert run.epochs(0, 2) == [False, False]
    assert math.isnan(run.growth.predicted)


def test_stops_at_max_batch_size():
    run = Run(budget=math.inf, max_batch_size=31)
    assert run.epochs(0, 3) == [True, False, False]


def test_stops_at_the_samples_of_an_epoch():
    run = Run(budget=math.inf)
    assert run.epochs(0, 4) == [True, True, False, False]
    assert run.steps == [4, 2, 1, 1]


# -------------------------------------------------------------------- the learning rate

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),  # with a restart
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, step_size_up=3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=9),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch))], [4]
    ),
}


@pytest.mark.parametrize(
    ("scaling", "factor"), [("none", 1), ("linear", 2), ("sqrt", 2**0.5), (lambda doubled: 1.5 * doubled, 3)]
)
def test_scales_the_learning_rate(scaling, factor):
    run = Run(budget=AT_16, lr_scaling=scaling)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.02})
    run.epochs(0, 2)
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.1 * factor, 0.02 * factor]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scales_what_a_scheduler_will_set(name):
    grown, plain = (
        Run(budget=AT_16, boundaries=(0, 0, 0, 2), scheduler=SCHEDULERS[name], lr_scaling=s) for s in ("linear", "none")
    )
    for number in range(8):
        assert grown.epoch(number) == plain.epoch(number) == (number == 2)
        factor = 2 if number >= 2 else 1
        assert grown.optimizer.param_groups[0]["lr"] == pytest.approx(factor * plain.optimizer.param_groups[0]["lr"], rel=1e-12)
        assert grown.scheduler.get_last_lr() == [grown.optimizer.param_groups[0]["lr"]]


def test_a_scheduler_knows_the_rate_before_its_step():
    run = Run(budget=AT_16, boundaries=(2,), scheduler=SCHEDULERS["step"], lr_scaling="linear")
    run.local.trace(torch.randn(2, 8))
    run.growth.step()
    assert run.scheduler.get_last_lr() == [0.2]


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor():
    run = Run(budget=AT_16, lr_scaling="linear")
    rate = run.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    run.epoch(0)
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.2)


@pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan, "2"])
def test_a_bad_factor_changes_nothing(factor):
    run = Run(budget=AT_16, lr_scaling=lambda doubled: factor)
    with pytest.raises(ValueError, match="lr_scaling must return a finite number above 0, got"):
        run.epoch(0)
    assert (run.batch_sampler.batch_size, run.optimizer.param_groups[0]["lr"]) == (8, 0.1)


# -------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [1, 3, 4])
def test_resumes_bit_for_bit(at):
    def fresh():
        return Run(budget=AT_16, boundaries=(0, 1, 2), scheduler=SCHEDULERS["lambda"], lr_scaling="linear")

    whole, part = fresh(), fresh()
    assert whole.epochs(0, 6) == [False, True, False, False, False, False]
    part.epochs(0, at)
    rest = fresh().load(part.saved())
    assert rest.batch_sampler.batch_size == part.batch_sampler.batch_size
    rest.epochs(at, 6)
    assert rest.steps == whole.steps[at:]
    assert rest.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert rest.growth.state_dict() == whole.growth.state_dict() == {"format": 1, "batch_size": 16, "growths": 1}
    for ours, theirs in zip(rest.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_peaks_of_a_device_are_resumed_too(monkeypatch):
    """They are the highest of all steps at a boundary: without them the epochs before would be forgotten."""
    device = FakeDevice(monkeypatch)

    def fresh():
        run = Run(budget=math.inf, boundaries=(0, 1))
        run.growth = BatchGrowth(run.local, run.batch_sampler, memory_budget=17_000)
        run.local.trace(torch.randn(2, 8))
        return run

    whole = fresh()
    for peak in (9000, 8000):
        device.step(whole, peak)
    assert not whole.growth.step()
    assert whole.growth.predicted == 18_000
    resumed = fresh().load(whole.saved())
    device.step(resumed, 8000)
    assert not resumed.growth.step()
    assert resumed.growth.predicted == 18_000
    assert resumed.growth.state_dict() == whole.growth.state_dict()


def test_a_state_of_another_format_is_refused():
    run = Run(budget=1)
    with pytest.raises(ValueError, match="state must have format 1, got 2"):
        run.growth.load_state_dict({"format": 2, "batch_size": 16, "growths": 1})
    assert run.batch_sampler.batch_size == 8


# -------------------------------------------------------------------- several processes


@pytest.mark.parametrize("rule", ["frozen", "hebbian"])
@distributed_test(world_size=2)
def test_two_processes_grow_together_and_reduce_half_as_often(rule):
    run = Run(budget=AT_16, boundaries=(0, 0, 2), replicated=True, lr_scaling="linear", rule=rule)
    forwards, gradients = [], []
    for number in range(4):
        before = run.model.traffic
        run.epoch(number)
        forwards.append(run.model.traffic.steps - before.steps)
        gradients.append(run.model.traffic.gradients - before.gradients)
    assert forwards == [4, 4, 2, 2]
    assert gradients == [4 * 4 * PARAMETERS, 4 * 4 * PARAMETERS, 2 * 4 * LAST, 2 * 4 * LAST]
    both = 4 * (8 * 16 + 16 * 16 + 2)  # of the two local layers, and how often each ran, in each of the last four forwards
    assert run.model.traffic.correlations == (4 * both if rule == "hebbian" else 0)
    assert run.optimizer.param_groups[0]["lr"] == 0.2
    check_replicas(run.local)


@distributed_test(world_size=2)
def test_two_processes_resume_bit_for_bit():
    def fresh():
        return Run(budget=AT_16, boundaries=(0, 2), replicated=True, lr_scaling="linear", scheduler=SCHEDULERS["cosine"])

    whole, part = fresh(), fresh()
    assert whole.epochs(0, 4) == [True, False, False, False]
    part.epochs(0, 2)
    rest = fresh().load(part.saved())
    rest.epochs(2, 4)
    assert rest.steps == [2, 2]
    assert rest.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    for ours, theirs in zip(rest.network.state_dict().values(), whole.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("largest", [0, 1])
@distributed_test(world_size=2)
def test_the_process_that_needs_most_decides(largest):
    activations = 100 if dist.get_rank() == largest else 50
    run = Run(budget=399, replicated=True, measure=lambda whole: StepMemory(0, activations, 8))
    assert run.epochs(0, 3) == [True, False, False]  # 200, then 400
    assert run.growth.predicted == 400
    assert run.batch_sampler.batch_size == 16


@distributed_test(world_size=2)
def test_a_process_that_does_not_know_holds_all_back():
    run = Run(budget=math.inf, replicated=True, measure=lambda whole: StepMemory(0, 1, 8) if dist.get_rank() else None)
    assert run.epoch(0) is False
    assert math.isnan(run.growth.predicted)


@distributed_test(world_size=2)
def test_batches_of_different_sizes_are_refused():
    run = Run(budget=math.inf, replicated=True)
    run.epoch(0)
    run.batch_sampler.batch_size = 4 + dist.get_rank()
    message = raises_everywhere(RuntimeError, run.growth.step)
    assert "batch_size must be the same on all processes, got 4, 5" in message


# -------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"local": None}, TypeError, "local must be a LocalizedLearning, got NoneType"),
        (
            {"batch_sampler": BatchSampler(range(4), 2, False)},
            TypeError,
            "batch_sampler must be a ResizableBatchSampler, got BatchSampler",
        ),
        ({"memory_budget": "1"}, TypeError, "memory_budget must be a number of bytes, got '1'"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be above 0, got 0"),
        ({"memory_budget": math.nan}, ValueError, "memory_budget must be above 0, got nan"),
        ({"lr_scaling": "double"}, ValueError, "lr_scaling must be one of none, linear, sqrt or a callable, got 'double'"),
        ({"schedulers": 3}, TypeError, "schedulers must be torch.optim.lr_scheduler.LRScheduler, got int"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be at least 1, got 0"),
        ({"measure": 3}, TypeError, "measure must be callable or None, got 3"),
        (
            {"measure": None},
            ValueError,
            r"measure must be given for a network on cpu, such as SavedMemory\(local, x\); got None",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    run = Run(budget=1)
    arguments = {"local": run.local, "batch_sampler": run.batch_sampler, "memory_budget": 1, "measure": lambda whole: None}
    with pytest.raises(error, match=message):
        BatchGrowth(**{**arguments, **changes})


def test_a_scheduler_that_is_not_named_is_asked_for():
    run = Run(budget=1, scheduler=SCHEDULERS["step"])
    with pytest.raises(ValueError, match="schedulers must be given where a scheduler sets the learning rate"):
        BatchGrowth(run.local, run.batch_sampler, memory_budget=1, lr_scaling="linear", measure=lambda whole: None)


def test_a_learning_rate_needs_an_optimizer():
    local = LocalizedLearning(network(), None, epochs=9, refresh=None)
    with pytest.raises(ValueError, match="lr_scaling must be 'none' where local has no optimizer, got 'sqrt'"):
        BatchGrowth(local, ResizableBatchSampler(range(4), 2), memory_budget=1, lr_scaling="sqrt", measure=lambda whole: None)
