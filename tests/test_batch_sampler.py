"""The batch sampler whose size may change."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from localsgd_ext import ResizableBatchSampler


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
def test_without_a_change_it_is_torchs_sampler(size, drop_last):
    ours, theirs = ResizableBatchSampler(range(10), size, drop_last), BatchSampler(range(10), size, drop_last)
    assert isinstance(ours, BatchSampler)
    for _ in range(2):
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


def test_a_change_holds_from_the_next_epoch_and_for_the_length():
    sampler = ResizableBatchSampler(range(7), 2)
    loader = DataLoader(TensorDataset(torch.arange(7)), batch_sampler=sampler)
    assert [len(x) for (x,) in loader] == [2, 2, 2, 1]
    sampler.batch_size = 4
    assert [len(x) for (x,) in loader] == [4, 3]
    assert len(loader) == len(sampler) == 2


@pytest.mark.parametrize(("drop_last", "rest"), [(False, [[6, 7]]), (True, [])])
def test_a_change_in_an_epoch_holds_from_the_next_batch_and_loses_nothing(drop_last, rest):
    sampler = ResizableBatchSampler(range(8), 2, drop_last)
    drawn = iter(sampler)
    assert next(drawn) == [0, 1]
    sampler.batch_size = 4
    assert next(drawn) == [2, 3, 4, 5]
    assert list(drawn) == rest


def test_with_a_distributed_sampler():
    samplers = [ResizableBatchSampler(DistributedSampler(range(16), 2, rank, shuffle=False), 2) for rank in range(2)]
    assert [next(iter(sampler)) for sampler in samplers] == [[0, 2], [1, 3]]
    for sampler in samplers:
        sampler.batch_size = 4
    assert [list(sampler) for sampler in samplers] == [[[0, 2, 4, 6], [8, 10, 12, 14]], [[1, 3, 5, 7], [9, 11, 13, 15]]]


def test_the_samplers_state_is_its_size():
    sampler = ResizableBatchSampler(range(8), 2)
    sampler.batch_size = 4
    again = ResizableBatchSampler(range(8), 2)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "batch_size must be at least 1, got 0"),
        (2.0, TypeError, r"batch_size must be an int, got 2\.0"),
        (True, TypeError, "batch_size must be an int, got True"),
    ],
)
def test_bad_sizes(value, error, message):
    with pytest.raises(error, match=message):
        ResizableBatchSampler(range(8), value)
    sampler = ResizableBatchSampler(range(8), 2)
    with pytest.raises(error, match=message):
        sampler.batch_size = value
    assert sampler.batch_size == 2
