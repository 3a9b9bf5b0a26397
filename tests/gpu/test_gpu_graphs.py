"""Nothing on the hot path waits for the device or allocates: updates can be captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cases import Case
from layers import FEW, FEW_ELIGIBLE, LOW, layer, needs_cuda

from benchmarks.gpu_graph import graph_equals_eager
from localsgd_ext import apply_update_, ops

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("case", "algorithm"), FEW_ELIGIBLE, ids=lambda v: str(v))
def test_hundreds_of_updates_in_a_graph_give_the_bits_of_eager_mode(case: Case, algorithm: str, dtype: torch.dtype) -> None:
    """Replayed with lr and its sign changing on the device."""
    assert graph_equals_eager(case, algorithm, dtype, updates=300)


def test_a_host_lr_is_captured_as_a_constant() -> None:
    given = layer(FEW[0])
    given.update(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given.update(0.25)
    expected = layer(FEW[0])
    for _ in range(3):
        graph.replay()
        expected.update(0.25)
    assert torch.equal(given.weight, expected.weight)


def test_all_layers_of_a_network_in_one_graph() -> None:
    """They share a workspace, and each has its own counter of skipped steps."""
    layers = [layer(case) for case in FEW]
    counters = [torch.zeros(1, dtype=torch.int64, device="cuda") for _ in layers]
    starts = [given.weight.clone() for given in layers]
    layers[1].x.zero_()
    if layers[1].bias is not None:
        layers[1].bias.zero_()
    layers[1].z.zero_()

    def step() -> None:
        for given, counter in zip(layers, counters, strict=True):
            given.update(0.01, skipped=counter)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for given, start, counter in zip(layers, starts, counters, strict=True):
        given.weight.copy_(start)
        counter.zero_()
    for _ in range(100):
        graph.replay()
    replayed = [given.weight.clone() for given in layers]
    assert [counter.item() for counter in counters] == [0, 100, 0, 0, 0]
    for given, start in zip(layers, starts, strict=True):
        given.weight.copy_(start)
    for _ in range(100):
        step()
    assert all(torch.equal(given.weight, weight) for given, weight in zip(layers, replayed, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize(("case", "algorithm"), FEW_ELIGIBLE, ids=lambda v: str(v))
def test_no_host_synchronisation(case: Case, algorithm: str) -> None:
    given = layer(case)
    lr, skipped = torch.tensor(0.01, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    given.update(lr, algorithm, skipped=skipped)  # the first call may set things up
    d = given.correlation(algorithm)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        given.update(lr, algorithm, skipped=skipped)
        given.update(-0.01, algorithm)
        given.correlation(algorithm)
        apply_update_([given.weight], [d], lr, skipped=skipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("case", "algorithm"), FEW_ELIGIBLE, ids=lambda v: str(v))
def test_no_allocation_on_the_hot_path(case: Case, algorithm: str) -> None:
    """Of ours: not even one that the caching allocator serves. ``library`` is PyTorch's operation, which returns a tensor."""
    if algorithm == "library":
        pytest.skip("PyTorch's operation allocates its result")
    given = layer(case)
    if algorithm == "auto":
        picked = ops.plan(given.x, given.z, given.weight, **given.arguments).pick if ops.is_compiled("cuda") else "reference"
        if picked in ("library", "reference"):
            pytest.skip(f"auto picks {picked}, which allocates its result")
    for _ in range(2):
        given.update(0.01, algorithm)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(10):
        given.update(0.01, algorithm)
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for key in ("allocation.all.allocated", "num_alloc_retries", "segment.all.allocated"):
        assert after[key] == before[key], key
