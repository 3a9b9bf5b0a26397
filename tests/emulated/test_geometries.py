"""Random layers through the CUDA kernels on an emulated GPU, against fp64: every algorithm, layout and dtype.

Operands lie in guarded memory between an unmapped page and a zone of NaN, the kernels' own buffers too (csrc/cuda/stream.h);
blocks and threads run in a seeded order. Coverage is counted, printed at the end and asserted.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from cases import LAYOUTS, Case, strided, with_layout
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from emulated import gpu
from localsgd_ext import ops, reference

FP64 = torch.float64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PAIRS = [(x, z) for x in DTYPES for z in DTYPES]
KINDS = ("linear", "pointwise", "grouped", "depthwise", "dense", "first")
EXAMPLES = 8  # of each kind, pair of dtypes and layout

coverage: Counter[str] = Counter()
finished = 0


@pytest.fixture(scope="module", autouse=True)
def _coverage() -> Iterator[None]:
    yield
    gpu.emulate()
    gpu.save_coverage(coverage)


@st.composite
def layers(draw: st.DrawFn, kind: str) -> Case:
    width = draw(st.sampled_from([1, 4, 8]))  # of channels: whole quads and chunks, or not
    if kind == "linear":
        rows = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=2)))
        channels, out = width * draw(st.integers(1, 20)), width * draw(st.integers(1, 20))
        return Case("", (*rows, channels), (out, channels), bias=draw(st.booleans()))
    dims = draw(st.sampled_from([2, 1, 3]))
    largest = {1: 6, 2: 4, 3: 3}[dims]
    kernel = (1,) * dims if kind == "pointwise" else tuple(draw(st.integers(1, largest)) for _ in range(dims))
    groups, each, out = 1, width * draw(st.integers(1, 10)), width * draw(st.integers(1, 10))
    if kind == "first":
        each, out = draw(st.integers(1, 6)), 8 * draw(st.integers(1, 10))
    if kind == "grouped":
        groups, each, out = draw(st.integers(2, 4)), width * draw(st.integers(1, 3)), width * draw(st.integers(1, 3))
    if kind == "depthwise":
        groups, each, out = draw(st.integers(2, 70)), 1, draw(st.integers(1, 2))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(dims))
    most = {1: 60, 2: 12, 3: 6}[dims]
    space = tuple(
        max(draw(st.integers(1, most)), d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    if kind == "first":  # rows of whole chunks
        least = (space[-1] + 7) // 8
        space = (*space[:-1], 8 * draw(st.integers(least, max(least, 6))))
    x = (draw(st.integers(1, 3)), groups * each, *space)
    weight = (groups * out, each, *kernel)
    return Case("", x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=draw(st.booleans()))


@st.composite
def gpus(draw: st.DrawFn) -> dict[str, int | bool]:
    return {
        "seed": draw(st.integers(0, 2**31)),
        "multiprocessors": draw(st.integers(1, 4)),
        "blocks": draw(st.integers(1, 2)),
        "cooperative": draw(st.booleans()),
        "compute": draw(st.sampled_from([61, 75, 80, 90])),
    }


def scale_of(case: Case, x: Tensor, z: Tensor) -> float:
    """The size of what D's sums are made of: their rounding errors are relative to it, whatever cancels."""
    d = reference.correlation(x.to(FP64).abs(), z.to(FP64).abs(), torch.empty(case.weight, dtype=FP64), **case.arguments)
    return float(d.norm())


def oracle(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str) -> Tensor:
    if algorithm != "gram":
        return reference.correlation(x.to(FP64), z.to(FP64), weight.to(FP64), **case.arguments)
    lower = z.element_size() < weight.element_size()  # the forward rounded its parameters to that
    w, b = (None if t is None else (t.to(z.dtype) if lower else t).to(FP64) for t in (weight, bias))
    return reference.correlation(x.to(FP64), None, w, bias=b, algorithm="gram", **case.arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_fp64_and_stays_within_its_memory(kind: str, pair: tuple[str, str], layout: str) -> None:
    by_segments = kind == "first" and layout == "channels_last" and pair[0] == pair[1]  # of some; nothing else is

    @seed(zlib.crc32(f"{kind} {pair} {layout}".encode()))
    @settings(
        max_examples=EXAMPLES * (5 if by_segments else 1), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=layers(kind), device=gpus(), tf32=st.booleans(), is_output=st.booleans(), strided_bias=st.booleans())
    def holds(case: Case, device: dict[str, int], tf32: bool, is_output: bool, strided_bias: bool) -> None:
        check(case, device, pair, layout, tf32, is_output, strided_bias)

    holds()
    global finished
    finished += 1


def check(
    case: Case, device: dict[str, int], pair: tuple[str, str], layout: str, tf32: bool, is_output: bool, strided_bias: bool
) -> None:
    gpu.emulate(**device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    x, weight, bias = case.sample(FP64)
    z = case.forward(x, weight, bias)
    x, weight, bias = x.to(DTYPES[pair[0]]), weight.float(), None if bias is None else bias.float()
    z = z.to(DTYPES[pair[1]])
    bias = strided(bias) if strided_bias else bias
    with gpu.Guarded() as memory:
        x, z = (memory.copy(with_layout(t, layout, case)) for t in (x, z))
        weight, bias = memory.copy(weight), None if bias is None else memory.copy(bias)
        scale = scale_of(case, x, z)
        arguments = {"bias": bias, "z_is_output": is_output, **case.arguments}
        plan = ops.plan(x, z, weight, **arguments)
        for candidate in plan.candidates:
            algorithm = candidate.algorithm
            assert candidate.eligible == (algorithm in case.algorithms), candidate.why_not
            if not candidate.eligible or algorithm == "library":
                continue
            core = candidate.configuration.split(",")[0].rsplit(" ", 1)[0]
            coverage[f"{algorithm} {layout} {pair[0]} {pair[1]}"] += 1
            coverage[f"core {core}"] += 1
            coverage[f"segments of {layout} {pair[0]}"] += "x by segments" in candidate.configuration
            coverage["strided bias"] += strided_bias and bias is not None
            truth = oracle(case, x, z, weight, bias, algorithm)
            # Matrix units round fp32 operands where they may: to tf32, or as autocast rounded x.
            rounding = 2**-8 if "mma_bf16" in core and "f32" in pair else 2**-10 if "mma" in core and "f32" in pair else 0
            if "product mma_bf16" in candidate.configuration and " 2 pairs" in candidate.configuration:
                rounding += 2**-18  # of G in two parts
            limit = (2e-6 + rounding) * (scale if algorithm != "gram" else max(scale, float(truth.norm())))
            d = ops.correlation(x, z, weight, algorithm=algorithm, **arguments)
            assert float((d.to(FP64) - truth).norm()) <= limit
            before = weight.clone()
            skipped = torch.zeros((), dtype=torch.int64)
            ops.hebbian_update_(weight, x, z, -0.25, algorithm=algorithm, skipped=skipped, **arguments)
            norm = float(d.to(FP64).norm())
            assert skipped.item() == (norm == 0)
            expected = before.to(FP64) - (0.25 / norm * d.to(FP64) if norm else 0)
            torch.testing.assert_close(weight, expected.float(), rtol=2e-7, atol=2e-7)
            weight.copy_(before)
        assert memory.intact()


def test_the_random_layers_covered_what_there_is() -> None:
    """The tests above ran first, in this process."""
    if finished < len(KINDS) * len(PAIRS) * len(LAYOUTS):
        pytest.skip("not all tests of random layers were selected")
    for algorithm in ("gram", "direct", "depthwise"):
        for layout in LAYOUTS:
            for x, z in PAIRS:
                assert coverage[f"{algorithm} {layout} {x} {z}"] >= EXAMPLES, (algorithm, layout, x, z)
    assert coverage["strided bias"] >= 10 * EXAMPLES
    for dtype in DTYPES:
        assert coverage[f"segments of channels_last {dtype}"] >= EXAMPLES, dtype
    for core in ("ffma", "mma_bf16", "mma_f16", "mma_tf32"):
        assert coverage[f"core {core}"] >= EXAMPLES, core
