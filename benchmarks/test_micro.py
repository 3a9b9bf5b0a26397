"""pytest-benchmark's view of single layers on a CPU: ``make bench``. benchmarks/kernels.py is the thorough one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cases import LAYERS, Case

from benchmarks.baselines import functions, operands
from benchmarks.parity import Judge

BENCHMARKS = [
    (case, name)
    for case in LAYERS
    for name in ("auto", *case.cpu_algorithms, "wgrad", "user", *(("unfold",) if case.dims == 2 else ()))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "name"), BENCHMARKS, ids=lambda v: str(v).replace(" ", "-"))
def test_update(benchmark: Callable[..., object], case: Case, name: str) -> None:
    benchmark.group = case.name  # type: ignore[attr-defined]
    if name == "auto" or name in case.cpu_algorithms:
        small = operands(replace(case, x=(1, *case.x[1:])), "fp32", "nhwc", "cpu")
        parity = Judge(small.case, small.x, small.z, small.weight, small.bias).update(name)
        assert parity.ok, parity
    benchmark(functions(operands(case, "fp32", "nhwc", "cpu"), compiled=False, unfold=True)[name])
