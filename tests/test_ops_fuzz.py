"""Random geometries, strides, dtypes and special values against fp64; no case that a person would think of.

The terminal summary says how many there were of what; the last test holds that none of it was missed.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator

import cpu_tasks
import fuzz_coverage
import numpy as np
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
KINDS = ("linear", "pointwise", "grouped", "depthwise", "first", "winograd", "dense")
ALGORITHMS = ("auto", "gram", "depthwise", "winograd", "direct", "library")
REPEATED = ("expanded", "stretched")
STRIDES = ("contiguous", "channels_last", "sliced", "transposed", "window", *REPEATED)
SCALED = ("tiny", "huge", "zero")  # all elements of an operand
BAD = ("inf", "nan")  # one of them
EXAMPLES = {kind: 216 if kind in ("depthwise", "winograd") else 72 for kind in KINDS}  # of each stride pattern: 5544 in all

coverage: Counter[str] = Counter()
finished = 0


@pytest.fixture(scope="module", autouse=True)
def _coverage() -> Iterator[None]:
    yield
    fuzz_coverage.save(coverage)


@st.composite
def layers(draw: st.DrawFn, kind: str) -> Case:
    """One in four is so large that its sums are cut into several panels, tiles, parts or strips; depthwise and first layers have none."""
    large = draw(st.sampled_from([False] * 3 + [True])) and kind not in ("depthwise", "first")
    if kind == "linear":
        leading = [draw(st.integers(500, 3000))] if large else draw(st.lists(st.integers(1, 9), max_size=3))
        inputs, outputs = draw(st.integers(50 if large else 1, 280)), draw(st.integers(1, 100 if large else 280))
        return Case("random", (*leading, inputs), (outputs, inputs), bias=draw(st.booleans()))
    dims = 2 if kind in ("winograd", "first") else draw(st.integers(1, 3))
    largest = 1 if kind == "pointwise" else 8 if kind == "first" else {1: 7, 2: 5, 3: 3}[dims]
    kernel = draw(st.tuples(*[st.integers(1, largest)] * dims))
    stride = draw(st.tuples(*[st.integers(1, 2 if large else 4)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * dims))
    if kind == "winograd":
        kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
    padding: tuple[int, ...] | str = draw(st.tuples(*[st.integers(0, 4)] * dims))
    if draw(st.integers(0, 3)) == 0:
        padding, stride = "same", (1,) * dims
    groups = draw(st.integers(2, 40)) if kind == "depthwise" else draw(st.integers(2, 4)) if kind == "grouped" else 1
    if large:
        most = {"pointwise": 280, "winograd": 66, "dense": 100, "grouped": 66}[kind]
        per_group, outputs = draw(st.integers(33, most)), groups * draw(st.integers(33, 70))
        extra = (40, 62) if kind == "winograd" else {1: (200, 700), 2: (12, 26), 3: (3, 8)}[dims]
    else:
        per_group = 1 if kind == "depthwise" else draw(st.integers(1, 4 if kind == "first" else 20))
        outputs = groups * draw(st.integers(1, 3 if kind == "depthwise" else 12))
        extra = (0, 70) if kind == "first" else (0, (18 if dims == 3 else 36) // dims)
    pads = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)] if isinstance(padding, str) else padding
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, pads, strict=True)]
    space = [draw(st.integers(n + extra[0], n + extra[1])) for n in least]
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
def test_agrees_with_fp64(kind: str, strides: str, pytestconfig: pytest.Config) -> None:
    examples = max(1, round(EXAMPLES[kind] * pytestconfig.getoption("--fuzz-share")))

    @seed(zlib.crc32(f"{kind} {strides}".encode()))
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        case=layers(kind),
        x_kind=st.sampled_from(sorted(DTYPES)),
        z_kind=st.sampled_from(sorted(DTYPES)),
        z_strides=st.sampled_from(STRIDES),
        w_strides=st.sampled_from(["contiguous", "channels_last", "sliced", "window"]),
        special=st.sampled_from(["normal", "normal", *SCALED, *BAD]),
        where=st.sampled_from("xzWb"),
        place=st.integers(0, 10**6),
        threads=st.integers(1, 3),
    )
    def holds(
        case: Case, x_kind: str, z_kind: str, z_strides: str, w_strides: str, special: str, where: str, place: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        where = "W" if where == "b" and not case.bias else where
        reach = 10 if "f16" in (x_kind, z_kind) else 40  # products of two stay within fp32
        factor = {"tiny": 2.0**-reach, "huge": 2.0**reach, "zero": 0.0}.get(special, 1.0)

        def scaled(tensor: Tensor, name: str) -> Tensor:
            return tensor * factor if name == where else tensor

        x, weight, bias = case.sample(FP64)
        x, weight, bias = scaled(x, "x"), scaled(weight, "W"), None if bias is None else scaled(bias, "b")
        if strides in REPEATED:
            x = arranged(x, strides, case)
        z = scaled(case.forward(x, weight, bias), "z")
        wide = FP64 if "f64" in (x_kind, z_kind) else torch.float32
        x, z = arranged(x.to(DTYPES[x_kind]), strides, case), arranged(z.to(DTYPES[z_kind]), z_strides, case)
        weight, bias = arranged(weight.to(wide), w_strides, case), None if bias is None else bias.to(wide)
        if special in BAD:
            spoiled = {"x": x, "z": z, "W": weight, "b": bias}[where]
            assert spoiled is not None
            spoiled[tuple(int(i) for i in np.unravel_index(place % spoiled.numel(), spoiled.shape))] = float(special)
        check(case, x, z, weight, bias, where if special in BAD else "")
        named = special if special == "normal" else f"{special} {where}"
        count(case, x, z, threads, {"x": strides, "z": z_strides, "W": w_strides}, named)

    holds()
    global finished
    finished += examples == EXAMPLES[kind]


def count(case: Case, x: Tensor, z: Tensor, threads: int, strides: dict[str, str], special: str) -> None:
    coverage["cases"] += 1
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    for algorithm in ("auto", *case.cpu_algorithms):
        for operand, pattern in strides.items():
            coverage[f"{algorithm}|{operand}|{pattern}"] += 1
        coverage[f"{algorithm}|dtypes|{kinds[x.dtype]}-{kinds[z.dtype]}"] += 1
        coverage[f"{algorithm}|special|{special}"] += 1
        if algorithm == "direct" and cpu_tasks.has_few_channels(case, x, z):
            coverage["direct|columns|of few channels"] += 1
            continue
        packed = algorithm in ("gram", "winograd") or (algorithm == "direct" and not by_blas(case, x, z, algorithm))
        for what in cpu_tasks.several(case, algorithm, z.numel() // case.weight[0], threads) if packed else ():
            coverage[f"{algorithm}|several|{what}"] += 1
        if algorithm == "winograd":
            frequencies = cpu_tasks.winograd_plan(case, z.numel() // case.weight[0], threads)["frequencies"]
            coverage[f"winograd|frequencies|{frequencies}"] += 1


def by_blas(case: Case, x: Tensor, z: Tensor, algorithm: str) -> bool:
    """Whether the sums may be BLAS's: ``direct`` leaves them to it where it can read x and z as matrices."""
    return algorithm == "direct" and case.pointwise and x.dtype == z.dtype and x.element_size() >= 4


def check(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, bad: str) -> None:
    """``bad``: the operand that has an element which is not finite, if any."""
    truths: dict[bool, tuple[Tensor, float]] = {}
    for algorithm in ("auto", *case.cpu_algorithms):
        d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
        assert (d.shape, d.is_contiguous()) == (weight.shape, True)
        gram = algorithm == "gram"  # reads the weight and the bias where the others read z
        if bad and bad in ("xWb" if gram else "xz"):
            spreads_as_it_must(case, x, z, weight, bias, algorithm, d)
        else:
            if gram not in truths:
                truths[gram] = truth_and_scale(case, x, None if gram else z, weight, bias, z.dtype)
            close_to_fp64(case, x, z, algorithm, d, *truths[gram])
        written(case, x, z, weight, bias, algorithm, d)


def truth_and_scale(
    case: Case, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, z_dtype: torch.dtype
) -> tuple[Tensor, float]:
    """D in fp64, and the size of what its sums are made of; without ``z`` from the weight as the forward saw it."""
    if z is None and z_dtype.itemsize < weight.element_size():
        weight, bias = weight.to(z_dtype), None if bias is None else bias.to(z_dtype)
    given = [x, z, weight, bias] if z is None else [x, z, torch.zeros_like(weight), None]
    sizes = [None if t is None else t.to(FP64).abs() for t in given]
    return exact(case, *given), float(exact(case, *sizes).norm())  # type: ignore[arg-type]


def close_to_fp64(case: Case, x: Tensor, z: Tensor, algorithm: str, d: Tensor, truth: Tensor, scale: float) -> None:
    wide = FP64 if FP64 in (x.dtype, z.dtype) else torch.float32
    dtype = torch.promote_types(x.dtype, z.dtype) if algorithm in ("library", "auto") else wide
    tolerance = TOLERANCE[dtype]
    repeated = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    if repeated and (algorithm in ("library", "auto") or by_blas(case, x, z, algorithm)):
        # PyTorch sums up to 3000 products in one chain; where all are the same, so are their rounding errors.
        tolerance = max(tolerance, z.numel() / len(d) * torch.finfo(wide).eps / 4)
    error = float((d.to(FP64) - truth).norm())
    assert error <= tolerance * scale, f"{algorithm}: an error of {error:.1e} in sums of {scale:.1e}"


def spreads_as_it_must(
    case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str, d: Tensor
) -> None:
    """Into each element of D that has the bad number among its factors; and, by products with padding, at most into its row."""
    spoiled = ~d.isfinite()
    rows = (~weight.isfinite()).flatten(1).any(1)
    if bias is not None:
        rows |= ~bias.isfinite()
    if algorithm == "gram" and rows.any():
        assert torch.equal(spoiled, whole_rows(rows, d))
        return
    x_marks, z_marks = (~x.isfinite()).to(FP64), (~z.isfinite()).to(FP64)
    touched = factors(case, x_marks, torch.ones_like(z_marks)) | factors(case, torch.ones_like(x_marks), z_marks)
    assert (touched <= spoiled).all(), algorithm
    if algorithm not in ("direct", "depthwise"):
        return
    if z_marks.any():
        channel = z.dim() - 1 - case.dims
        assert (spoiled <= whole_rows(z_marks.movedim(channel, 0).reshape(len(d), -1).any(1), d)).all(), algorithm
    elif case.padding_mode == "zeros":
        assert torch.equal(touched, spoiled), algorithm


def whole_rows(rows: Tensor, d: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (d.dim() - 1)).expand_as(d)


def factors(case: Case, x_marks: Tensor, z_marks: Tensor) -> Tensor:
    """Which elements of D multiply two marked elements."""
    weight = torch.empty(case.weight, dtype=FP64)
    return reference.correlation(x_marks, z_marks, weight, algorithm="direct", **case.arguments) > 0


def written(case: Case, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, algorithm: str, d: Tensor) -> None:
    """The update moves the weight along ``d``, or leaves it alone and says so."""
    before, skipped = weight.clone(), torch.zeros((), dtype=torch.int64)
    ops.hebbian_update_(weight, x, z, -0.25, bias=bias, algorithm=algorithm, skipped=skipped, **case.arguments)
    norm = torch.linalg.vector_norm(d, dtype=FP64)
    if norm == 0 or not norm.isfinite():
        assert skipped.item() == 1
        torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)
    else:
        expected = before.to(FP64) - 0.25 / norm * d.to(FP64)
        torch.testing.assert_close(weight, expected.to(weight.dtype), rtol=3e-7, atol=3e-7, equal_nan=True)
    weight.copy_(before)


def test_the_random_layers_covered_what_there_is() -> None:
    """The tests above ran first, in this process."""
    if finished < len(KINDS) * len(STRIDES):
        pytest.skip("not all tests of random layers were selected")
    assert coverage["cases"] >= 2000
    specials = ["normal", *(f"{special} {where}" for special in (*SCALED, *BAD) for where in "xzWb")]
    for algorithm in ALGORITHMS:
        wanted = [f"{operand}|{pattern}" for operand in "xz" for pattern in STRIDES]
        wanted += [f"dtypes|{x}-{z}" for x in DTYPES for z in DTYPES] + [f"special|{special}" for special in specials]
        for what in wanted:
            assert coverage[f"{algorithm}|{what}"] >= 5, f"{algorithm} {what}"
    assert coverage["direct|columns|of few channels"] >= 20
    for frequencies in (16, 24, 36):
        assert coverage[f"winograd|frequencies|{frequencies}"] >= 20, frequencies
    cut = {"gram": ("parts", "strips", "tiles", "panels"), "winograd": ("parts", "blocks", "panels")}
    for algorithm, whats in {**cut, "direct": (*cut["gram"], "chunks")}.items():
        for what in whats:
            assert coverage[f"{algorithm}|several|{what}"] >= 20, f"{algorithm} {what}"
