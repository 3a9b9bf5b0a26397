"""Random geometries, strides, dtypes and special values against fp64; no case that a person would think of.

The terminal summary says how many there were of what; the last test holds that none of it was missed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

import fuzz_coverage
import pytest
import torch
from cases import Case, with_layout
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from oracle import FP64, exact
from torch import Tensor

from localsgd_ext import ops, reference

pytestmark = [
    pytest.mark.skipif(not ops.is_compiled(), reason="the compiled module is what is tested here"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

# Relative to what D's sums are made of, for some thousand products; `library` rounds to the operands' dtype.
TOLERANCE = {FP64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
DTYPES = {"f64": FP64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KINDS = ("linear", "pointwise", "grouped", "depthwise", "dense")
ALGORITHMS = ("auto", "gram", "depthwise", "direct", "library")
REPEATED = ("expanded", "stretched")
STRIDES = ("contiguous", "channels_last", "sliced", "transposed", "window", *REPEATED)
SPECIALS = ("normal", "tiny", "zero", "inf", "nan")
EXAMPLES = {kind: 216 if kind == "depthwise" else 72 for kind in KINDS}  # of each stride pattern: 3024 in all

coverage: Counter[str] = Counter()
finished = 0


@pytest.fixture(scope="module", autouse=True)
def _coverage() -> Iterator[None]:
    yield
    fuzz_coverage.save(coverage)


@st.composite
def layers(draw: st.DrawFn, kind: str) -> Case:
    if kind == "linear":
        leading = draw(st.lists(st.integers(1, 9), max_size=3))
        inputs, outputs = draw(st.integers(1, 280)), draw(st.integers(1, 280))
        return Case("random", (*leading, inputs), (outputs, inputs), bias=draw(st.booleans()))
    dims = draw(st.integers(1, 3))
    largest = 1 if kind == "pointwise" else {1: 7, 2: 5, 3: 3}[dims]
    kernel = draw(st.tuples(*[st.integers(1, largest)] * dims))
    stride = draw(st.tuples(*[st.integers(1, 4)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * dims))
    padding: tuple[int, ...] | str = draw(st.tuples(*[st.integers(0, 4)] * dims))
    if draw(st.integers(0, 3)) == 0:
        padding, stride = "same", (1,) * dims
    groups = draw(st.integers(2, 40)) if kind == "depthwise" else draw(st.integers(2, 4)) if kind == "grouped" else 1
    per_group = 1 if kind == "depthwise" else draw(st.integers(1, 20))
    outputs = groups * draw(st.integers(1, 3 if kind == "depthwise" else 12))
    pads = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, pads, strict=True)]
    space = [draw(st.integers(n, n + (18 if dims == 3 else 36) // dims)) for n in least]
    whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)] if isinstance(padding, str) else pads
    modes = ["zeros", *(["reflect", "replicate", "circular"] if all(p < n for p, n in zip(whole, space, strict=True)) else [])]
    batch = draw(st.sampled_from([(1,), (2,), (3,), (4,), ()]))
    return Case(
        "random",
        (*batch, groups * per_group, *space),
        (outputs, per_group, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=draw(st.sampled_from(modes)),
        bias=draw(st.booleans()),
    )


def arranged(tensor: Tensor, strides: str, case: Case) -> Tensor:
    """The same values in another arrangement, amid NaN where there are gaps; ``expanded``: the first image for all of them,
    ``stretched``: the first column for all of them."""
    if strides == "expanded":
        return tensor[:1].expand_as(tensor) if tensor.dim() > 0 else tensor
    if strides == "stretched":
        return tensor[..., :1].expand_as(tensor)
    if strides == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if strides == "window":
        wide = torch.full([n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype)
        inner = wide[tuple(slice(1, n + 1) for n in tensor.shape)]
        return inner.copy_(tensor)
    return with_layout(tensor, strides if strides in ("channels_last", "sliced") else "contiguous", case)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_fp64(kind: str, strides: str) -> None:
    @seed(zlib.crc32(f"{kind} {strides}".encode()))
    @settings(max_examples=EXAMPLES[kind], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        case=layers(kind),
        x_kind=st.sampled_from(sorted(DTYPES)),
        z_kind=st.sampled_from(sorted(DTYPES)),
        z_strides=st.sampled_from(STRIDES),
        w_strides=st.sampled_from(["contiguous", "channels_last", "sliced", "window"]),
        special=st.sampled_from(["normal", *SPECIALS]),
        place=st.integers(0, 10**6),
        threads=st.integers(1, 2),
    )
    def holds(
        case: Case, x_kind: str, z_kind: str, z_strides: str, w_strides: str, special: str, place: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        x, weight, bias = case.sample(FP64)
        x = x * {"tiny": 2.0**-20, "zero": 0.0}.get(special, 1.0)
        if strides in REPEATED:
            x = arranged(x, strides, case)
        z = case.forward(x, weight, bias)
        x, z = x.to(DTYPES[x_kind]), z.to(DTYPES[z_kind])
        if special in ("inf", "nan"):
            x = x.contiguous()  # no longer repeated
            x.view(-1)[place % x.numel()] = float(special)
        x = arranged(x, "contiguous" if special in ("inf", "nan") and strides in REPEATED else strides, case)
        z = arranged(z, z_strides, case)
        wide = FP64 if FP64 in (x.dtype, z.dtype) else torch.float32
        bias = None if bias is None else bias.to(wide)
        check(case, x, z, arranged(weight.to(wide), w_strides, case), bias, special)
        coverage["cases"] += 1
        for algorithm in ("auto", *case.algorithms):
            coverage[f"{algorithm} x {strides}"] += 1
            coverage[f"{algorithm} z {z_strides}"] += 1
            coverage[f"{algorithm} W {w_strides}"] += 1
            coverage[f"{algorithm} {x_kind} {z_kind}"] += 1
            coverage[f"{algorithm} {special}"] += 1

    holds()
    global finished
    finished += 1


def check(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, special: str) -> None:
    for algorithm in ("auto", *case.algorithms):
        d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
        assert (d.shape, d.is_contiguous()) == (weight.shape, True)
        if special in ("inf", "nan"):
            bad = reads_bad_number(case, x, z)
            assert (bad <= ~d.isfinite()).all(), algorithm
            if algorithm in ("direct", "depthwise") and case.padding_mode == "zeros":
                assert torch.equal(bad, ~d.isfinite()), algorithm
        else:
            close_to_fp64(case, x, z, weight, bias, algorithm, d)
        written(case, x, z, weight, bias, algorithm, d)


def close_to_fp64(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str, d: Tensor) -> None:
    def size(*tensors: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.to(FP64).abs() for t in tensors]

    if algorithm == "gram":
        seen = z.dtype if z.element_size() < weight.element_size() else weight.dtype
        w, b = weight.to(seen), None if bias is None else bias.to(seen)
        truth = exact(case, x, None, w, b)
        scale = exact(case, *size(x, None, w, b)).norm()  # type: ignore[arg-type]
    else:
        truth, scale = exact(case, x, z, weight, bias), exact(case, *size(x, z, weight, bias)).norm()  # type: ignore[arg-type]
    wide = FP64 if FP64 in (x.dtype, z.dtype) else torch.float32
    dtype = torch.promote_types(x.dtype, z.dtype) if algorithm in ("library", "auto") else wide
    error = float((d.to(FP64) - truth).norm())
    assert error <= TOLERANCE[dtype] * float(scale), f"{algorithm}: {error / float(scale):.1e}"


def reads_bad_number(case: Case, x: Tensor, z: Tensor) -> Tensor:
    """Which elements of D have a number among their factors that is not finite."""
    marks = (~x.isfinite()).to(FP64)
    empty = torch.empty(case.weight, dtype=FP64)
    return reference.correlation(marks, torch.ones_like(z, dtype=FP64), empty, algorithm="direct", **case.arguments) > 0


def written(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str, d: Tensor) -> None:
    """The update moves the weight along ``d``, or leaves it alone and says so."""
    before, skipped = weight.clone(), torch.zeros((), dtype=torch.int64)
    ops.hebbian_update_(weight, x, z, -0.25, bias=bias, algorithm=algorithm, skipped=skipped, **case.arguments)
    norm = torch.linalg.vector_norm(d, dtype=FP64)
    if norm == 0 or not norm.isfinite():
        assert skipped.item() == 1
        assert torch.equal(weight, before)
    else:
        expected = before.to(FP64) - 0.25 / norm * d.to(FP64)
        torch.testing.assert_close(weight, expected.to(weight.dtype), rtol=3e-7, atol=3e-7)
    weight.copy_(before)


def test_the_random_layers_covered_what_there_is() -> None:
    """The tests above ran first, in this process."""
    if finished < len(KINDS) * len(STRIDES):
        pytest.skip("not all tests of random layers were selected")
    assert coverage["cases"] >= 2000
    for algorithm in ALGORITHMS:
        wanted = [f"{a} {s}" for a in "xz" for s in STRIDES] + [f"{x} {z}" for x in DTYPES for z in DTYPES] + list(SPECIALS)
        for what in wanted:
            assert coverage[f"{algorithm} {what}"] >= 10, f"{algorithm} {what}"
