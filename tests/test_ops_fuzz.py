"""Random geometries, strides and dtypes against fp64; no case that a person would think of."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Case, with_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FP64, exact, relative_error

from localsgd_ext import ops

pytestmark = [
    pytest.mark.skipif(not ops.is_compiled(), reason="the compiled module is what is tested here"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

# Norm-wise, for sums of a few thousand products; `library` rounds to the operands' dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
DTYPES = st.sampled_from(sorted(TOLERANCE, key=str))


@st.composite
def layers(draw: st.DrawFn) -> Case:
    dims = draw(st.integers(1, 3))
    small = 1 if dims == 3 else 2
    kernel = draw(st.tuples(*[st.integers(1, 7 if dims == 1 else 5 if dims == 2 else 3)] * dims))
    stride = draw(st.tuples(*[st.integers(1, 4)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * dims))
    padding: tuple[int, ...] | str = draw(st.tuples(*[st.integers(0, 4)] * dims))
    if draw(st.booleans()):
        padding, stride = "same", (1,) * dims
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.integers(1, 20))
    if draw(st.booleans()):  # depthwise
        groups, per_group = draw(st.integers(1, 40)), 1
    outputs = groups * draw(st.integers(1, 3 if groups > 3 else 12))
    pads = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, pads, strict=True)]
    space = [draw(st.integers(n, n + 18 * small // dims)) for n in least]
    return Case(
        "random",
        (draw(st.integers(1, 4)), groups * per_group, *space),
        (outputs, per_group, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    case=layers(),
    x_dtype=DTYPES,
    z_dtype=DTYPES,
    x_layout=st.sampled_from(LAYOUTS),
    z_layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 2),
)
def test_random_layers(
    case: Case, x_dtype: torch.dtype, z_dtype: torch.dtype, x_layout: str, z_layout: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    x, weight, bias = case.sample(FP64)
    z = case.forward(x, weight, bias).to(z_dtype)
    x, z = with_layout(x.to(x_dtype), x_layout, case), with_layout(z, z_layout, case)
    weight, bias = weight.float(), None if bias is None else bias.float()
    for algorithm in ("auto", *case.algorithms):
        d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
        if algorithm == "gram":
            seen = z_dtype if z.element_size() < 4 else torch.float32
            truth = exact(case, x, None, weight.to(seen), None if bias is None else bias.to(seen))
        else:
            truth = exact(case, x, z, weight, bias)
        common = torch.promote_types(x_dtype, z_dtype)
        # An output of few products may cancel to almost nothing: the floor keeps such a D from being compared to itself.
        scale = max(truth.norm().item(), x.double().norm().item() * z.double().norm().item() * 1e-3, 1e-30)
        error = (d.double() - truth).norm().item() / scale
        limit = TOLERANCE[common if algorithm in ("library", "auto") else FP64 if common == FP64 else torch.float32]
        assert error <= limit, f"{algorithm}: {error:.2e} > {limit:.0e}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    leading=st.lists(st.integers(1, 9), max_size=3),
    features=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    dtype=DTYPES,
)
def test_random_linear_layers(leading: list[int], features: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case("random", (*leading, features[0]), (features[1], features[0]))
    x, weight, _ = case.sample(FP64)
    x, z = x.to(dtype), case.forward(x, weight, None).to(dtype)
    for algorithm in ("direct", "library"):
        d = ops.correlation(x, z, weight.float(), algorithm=algorithm)
        limit = TOLERANCE[dtype if algorithm == "library" or dtype == FP64 else torch.float32]
        assert relative_error(d, exact(case, x, z, weight, None)) <= limit
