"""Every algorithm, dtype and layout against fp64, and what holds whatever the values are."""

from __future__ import annotations

import cpu_tasks
import pytest
import torch
from cases import CASES, EMPTY_CASES, LAYOUTS, Case, strided, with_layout
from oracle import FP64, bound, exact, relative_error
from torch import Tensor

from localsgd_ext import ops

pytestmark = [
    pytest.mark.skipif(not ops.is_compiled(), reason="the compiled module is what is tested here"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

DTYPES = (  # of x and z; weights are fp32, or fp64 with fp64 operands
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
)


def eligible(case: Case) -> tuple[str, ...]:
    """For the device that runs here, which may be an emulated GPU."""
    return case.algorithms if ops.is_compiled() and ops._C.gpu == "cpu" else case.cpu_algorithms


ELIGIBLE = [(case, algorithm) for case in CASES for algorithm in eligible(case)]


def operands(
    case: Case, x_dtype: torch.dtype, z_dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, weight, bias = case.sample(FP64)
    z = case.forward(x, weight, bias).to(z_dtype)
    wide = torch.float64 if FP64 in (x_dtype, z_dtype) else torch.float32
    bias = None if bias is None else bias.to(wide)
    return with_layout(x.to(x_dtype), layout, case), with_layout(z, layout, case), weight.to(wide), bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "algorithm"), ELIGIBLE, ids=lambda v: str(v))
def test_agrees_with_fp64(case: Case, algorithm: str, layout: str) -> None:
    for x_dtype, z_dtype in DTYPES:
        x, z, weight, bias = operands(case, x_dtype, z_dtype, layout)
        d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
        assert d.shape == weight.shape
        assert d.is_contiguous()
        accumulate = FP64 if FP64 in (x_dtype, z_dtype) else torch.float32
        assert d.dtype == accumulate
        # Sums run in fp32 even over low-precision operands; only PyTorch's own gradient is rounded to their dtype.
        dtype = torch.bfloat16 if (algorithm, x_dtype, z_dtype) == ("library", torch.bfloat16, torch.bfloat16) else accumulate
        if algorithm == "gram":
            seen = z_dtype if z.element_size() < weight.element_size() else weight.dtype
            w, b = weight.to(seen), None if bias is None else bias.to(seen)
            error, limit = relative_error(d, exact(case, x, None, w, b)), bound(case, x, None, w, b, dtype)
            # Emulated: G in two parts of bf16.
            if getattr(ops._C, "gpu", None) == "cpu" and x_dtype == z_dtype == torch.bfloat16:
                limit = max(limit, 2**-17)
        else:
            error, limit = relative_error(d, exact(case, x, z, weight, bias)), bound(case, x, z, weight, bias, dtype)
        assert error <= limit, f"x {x_dtype}, z {z_dtype}: error {error:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_z_means_the_layers_own_output(case: Case, layout: str) -> None:
    x, weight, bias = case.sample(layout=layout)
    for algorithm in ("auto", *eligible(case)):
        d = ops.correlation(x, None, weight, bias=bias, algorithm=algorithm, **case.arguments)
        z = case.forward(x.double(), weight.double(), None if bias is None else bias.double())
        assert relative_error(d, exact(case, x, z, weight, bias)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.bias], ids=str)
def test_a_bias_may_be_strided(case: Case, dtype: torch.dtype) -> None:
    x, z, weight, bias = operands(case, dtype, dtype)
    assert bias is not None
    for algorithm in ("auto", *eligible(case)):
        given = {"algorithm": algorithm, "z_is_output": True, **case.arguments}
        expected = ops.correlation(x, z, weight, bias=bias, **given)
        assert torch.equal(ops.correlation(x, z, weight, bias=strided(bias), **given), expected)
        steps = weight.clone(), weight.clone()
        for step, b in zip(steps, (bias, strided(bias)), strict=True):
            ops.hebbian_update_(step, x, z, 0.1, bias=b, **given)
        assert torch.equal(*steps)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_reads_the_z_it_is_given(case: Case) -> None:
    x, weight, bias = case.sample()
    z = torch.randn_like(case.forward(x, weight, bias))  # not the layer's output
    d = ops.correlation(x, z, weight, bias=bias, **case.arguments)
    assert relative_error(d, exact(case, x, z, weight, bias)) < 2e-6
    assert ops.plan(x, z, weight, bias=bias, **case.arguments).pick != "gram"


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "algorithm"), ELIGIBLE, ids=lambda v: str(v))
def test_same_bits_every_run(case: Case, algorithm: str, layout: str) -> None:
    x, z, weight, bias = operands(case, torch.float32, torch.float32, layout)
    first = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
    for _ in range(2):
        again = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
        assert (again - first).abs().max().item() == 0.0


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("algorithm", ["direct", "gram"])
def test_long_sums_are_as_precise_as_pytorch_s(algorithm: str, layout: str) -> None:
    """Few channels at 401,408 positions, of images that lie together or apart: BLAS alone would sum in one chain."""
    case = Case("long", (2, 16, 448, 448), (24, 16, 1, 1))
    x, z, weight, _ = operands(case, torch.float32, torch.float32, layout)
    expected = torch.einsum("nkpq,ncpq->kc", z.double(), x.double())[:, :, None, None]

    def error(d: Tensor) -> float:
        return float((d - expected).norm() / expected.norm())

    theirs = error(ops.correlation(x, z, weight, algorithm="library"))
    assert error(ops.correlation(x, z, weight, algorithm=algorithm, z_is_output=True)) <= 2 * theirs


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [c for c in CASES if c.depthwise], ids=str)
def test_depthwise_bits_do_not_depend_on_the_number_of_threads(case: Case, layout: str) -> None:
    x, z, weight, _ = operands(case, torch.float32, torch.float32, layout)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.correlation(x, z, weight, algorithm="depthwise", **case.arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


SHARED = (  # by threads, in several parts of the positions or several strips of D
    Case("dense-parts", (4, 20, 48, 44), (48, 20, 3, 3), padding=1),  # winograd: 2 parts, or all threads share each block
    Case("dense-strips", (3, 64, 19, 18), (40, 64, 3, 3), padding=1),
    Case("grouped-parts", (2, 40, 40, 40), (96, 20, 3, 3), padding=1, groups=2),
    Case("grouped-strips", (2, 64, 11, 10), (40, 32, 3, 3), padding=1, groups=2),
    Case("1x1-parts", (2, 96, 37, 36), (60, 96, 1, 1), bias=True),
    Case("1x1-strips", (2, 300, 13, 12), (40, 300, 1, 1), bias=True),
    Case("1x1-strips-and-parts", (1, 260, 300, 240), (40, 260, 1, 1)),
    Case("1x1-parts-stride2", (2, 100, 73, 72), (60, 100, 1, 1), stride=2),
    Case("linear-parts", (2101, 120), (70, 120), bias=True),
    Case("linear-strips", (301, 400), (64, 400), bias=True),
)


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64], ids=["f32", "bf16", "f64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case: Case, layout: str, dtype: torch.dtype) -> None:
    """Of our own kernels. A BLAS product that ``direct`` makes of matrices is cut by threads from some 1000 positions on."""
    x, z, weight, bias = operands(case, dtype, dtype, layout)
    matrices = case.pointwise and case.stride == 1 and dtype != torch.bfloat16
    for algorithm in ("gram",) if matrices else [a for a in eligible(case) if a != "library"]:
        assert {"parts", "strips", "blocks"} & set(cpu_tasks.several(case, algorithm, z.numel() // case.weight[0], 4))
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments))
        assert all(torch.equal(results[0], d) for d in results[1:]), algorithm


FIRST = Case("first", (3, 3, 70, 61), (12, 3, 7, 7), stride=2, padding=3)


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
def test_bits_of_first_layers_do_not_depend_on_the_number_of_threads() -> None:
    x, z, weight, _ = operands(FIRST, torch.float32, torch.float32, "contiguous")
    x, z = x.repeat(8, 1, 1, 1), z.repeat(8, 1, 1, 1)
    assert cpu_tasks.has_few_channels(FIRST, x, z)
    assert cpu_tasks.few_channels_parts(FIRST, z) > 4
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.correlation(x, z, weight, algorithm="direct", **FIRST.arguments))
    assert all(torch.equal(results[0], d) for d in results[1:])


@pytest.mark.parametrize("dtypes", [("f32", "f32"), ("f32", "bf16"), ("bf16", "f32"), ("f64", "f32"), ("f32", "f64")], ids=str)
@pytest.mark.parametrize("case", [FIRST, *(c for c in CASES if c.dims == 2 and c.groups == 1)], ids=str)
def test_weights_of_f64_are_updated_in_f64(case: Case, dtypes: tuple[str, str]) -> None:
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": FP64}
    x, z, weight, bias = operands(case, kinds[dtypes[0]], kinds[dtypes[1]], "contiguous")
    expected = exact(case, x, z, weight, bias)
    for algorithm in set(eligible(case)) - {"gram"}:  # which computes z anew
        d = ops.correlation(x, z, weight.to(FP64), bias=bias, algorithm=algorithm, **case.arguments)
        assert d.dtype == FP64
        assert relative_error(d, expected) <= (2e-2 if algorithm == "library" else 1e-12), algorithm


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
def test_long_sums_do_not_cost_precision() -> None:
    """Of 100,000 positions, as the early layers of a network for ImageNet have them; in NCHW PyTorch adds image by image."""
    case = Case("", (32, 256, 56, 56), (16, 256, 1, 1))
    x, weight, _ = case.sample()
    x.relu_()
    z = case.forward(x, weight, None)
    error = relative_error(ops.correlation(x, z, weight, algorithm="gram"), exact(case, x, z, weight, None))
    assert error <= bound(case, x, z, weight, None, torch.float32)


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
@pytest.mark.parametrize("case", [
    Case("4x4", (32, 512, 4, 4), (512, 512, 3, 3), padding=1),
    Case("4x2", (64, 256, 4, 2), (256, 256, 3, 3), padding=1),
    Case("4x6", (4, 256, 4, 6), (256, 256, 3, 3), padding=1),
    Case("7x7", (32, 128, 7, 7), (128, 128, 3, 3), padding=1),
    Case("8x8", (8, 128, 8, 8), (128, 128, 3, 3), padding=1),  # the fewest positions that are taken in tiles of 2 x 4
    Case("16x16", (16, 128, 16, 16), (128, 128, 3, 3), padding=1),  # 4 x 4
    Case("14x14", (32, 128, 14, 14), (128, 128, 3, 3), padding=1),
], ids=str)  # fmt: skip
def test_minimal_filtering_of_few_positions_is_as_exact(case: Case) -> None:
    """Short sums have small errors in PyTorch. Where z has nothing to do with x, sums are small, too."""
    x, weight, _ = case.sample(layout="channels_last")
    z = torch.randn_like(case.forward(x, weight, None))
    error = relative_error(ops.correlation(x, z, weight, padding=1, algorithm="winograd"), exact(case, x, z, weight, None))
    assert error <= bound(case, x, z, weight, None, torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "algorithm"), ELIGIBLE, ids=lambda v: str(v))
def test_reads_no_uninitialized_memory(case: Case, algorithm: str, layout: str) -> None:
    x, z, weight, bias = operands(case, torch.bfloat16, torch.float32, layout)
    d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
    assert d.isfinite().all()


@pytest.mark.parametrize("case", [*CASES, *EMPTY_CASES], ids=str)
def test_operands_are_left_alone(case: Case) -> None:
    x, weight, bias = case.sample()
    z = case.forward(x, weight, bias)
    kept = [t.clone() for t in (x, z, weight)]
    versions = [t._version for t in (x, z, weight)]
    for algorithm in eligible(case):
        ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.arguments)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, z, weight), strict=True))
    assert versions == [t._version for t in (x, z, weight)]


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_empty_batch_has_no_correlation(case: Case) -> None:
    x, weight, bias = case.sample()
    for algorithm in ("auto", *eligible(case)):
        d = ops.correlation(x, case.forward(x, weight, bias), weight, bias=bias, algorithm=algorithm, **case.arguments)
        assert d.shape == weight.shape
        assert d.dtype == torch.float32
        assert not d.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["one tap", "unread", "last column", "first row", "last row"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", ["depthwise", "direct"])
def test_a_bad_number_reaches_exactly_the_taps_that_read_it(
    algorithm: str, layout: str, value: float, where: str, dtype: torch.dtype
) -> None:
    """Vectors longer than a row must not let a neighbour's Inf in: 0 * Inf is NaN."""
    touched = torch.zeros(4, 1, 3, 3, dtype=torch.bool)
    row = 5  # 1 * 5 + 0, and in reach of all three rows where the stride is 1
    if where in ("first row", "last row"):  # 0 and 11: one row of the kernel would read them from beyond z
        case, column = Case("", (1, 4, 12, 12), (4, 1, 3, 3), padding=1, groups=4), 7
        row = 0 if where == "first row" else 11
        touched[2, 0, slice(0, 2) if row == 0 else slice(1, 3)] = True
    elif where == "last column":  # 11: read by column 2 of the kernel only, but beside what the others read last
        case, column = Case("", (1, 4, 12, 12), (4, 1, 3, 3), groups=4), 11
        touched[2, 0, :, 2] = True
    else:  # columns 3, 4, 8 and 9 are never read; 6 is 1 * 5 + 1
        case, column = Case("", (1, 4, 13, 13), (4, 1, 3, 3), stride=5, groups=4), 6 if where == "one tap" else 8
        touched[2, 0, 0, 1] = where == "one tap"
    x, weight, _ = case.sample(FP64)
    z = torch.randn_like(case.forward(x, weight, None))
    x[0, 2, row, column] = value
    x, z = with_layout(x.to(dtype), layout, case), with_layout(z.to(dtype), layout, case)
    d = ops.correlation(x, z, weight.float(), algorithm=algorithm, **case.arguments)
    if algorithm == "depthwise" and ops._C.gpu == "cpu":  # emulated: see the kernel's add_tile
        spread = touched.any(-1, keepdim=True).expand_as(touched)
        assert (touched <= ~d.isfinite()).all()
        assert (~d.isfinite() <= spread).all()
    else:
        assert torch.equal(~d.isfinite(), touched)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_short_planes_with_gaps_between_their_rows(size: int, z_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Where planes of z have gaps, those near the end of memory are copied and have none: some channels are summed one way, some another."""
    case = Case("", (3, 40, size, size), (40, 1, 3, 3), padding=1, groups=40)
    x, weight, _ = case.sample(FP64)
    z = torch.randn_like(case.forward(x, weight, None))
    x, z, weight = x.to(x_dtype), z.to(z_dtype), weight.float()
    wide = torch.full((*z.shape[:-1], size + 3), float("nan"), dtype=z_dtype)
    wide[..., :size] = z
    d = ops.correlation(x, wide[..., :size], weight, algorithm="depthwise", **case.arguments)
    assert relative_error(d, exact(case, x, z, weight, None)) < 1e-5


@pytest.mark.parametrize("case", [
    Case("1-d", (1, 2, 1), (4, 1, 3), stride=2, padding=1, groups=2),
    Case("2-d", (2, 4, 5, 2), (8, 4, 3, 3), stride=(1, 3), padding=1),
    Case("1x1", (2, 4, 5, 2), (8, 4, 1, 1), stride=3, padding=3),
], ids=str)  # fmt: skip
def test_bf16_rows_shorter_than_the_stride(case: Case) -> None:
    x, z, weight, _ = operands(case, torch.bfloat16, torch.bfloat16)
    truth = exact(case, x, z, weight, None)
    for algorithm in ("auto", *eligible(case)):
        for _ in range(20):
            for size in range(64, 4096, 64):
                torch.full((size,), float("nan"))  # what is found in fresh memory
            d = ops.correlation(x, z, weight, algorithm=algorithm, **case.arguments)
            assert relative_error(d, truth) < 1e-2, algorithm


def test_autocast_and_grad_mode_do_not_matter() -> None:
    case = Case("", (2, 8, 9, 9), (12, 8, 1, 1), bias=True)
    x, weight, bias = case.sample()
    weight.requires_grad_()
    z = case.forward(x, weight, bias).detach()
    for algorithm in eligible(case):
        plain = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm)
        with torch.inference_mode():
            inference = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm)
        assert not plain.requires_grad
        assert torch.equal(plain, cast)
        assert torch.equal(plain, inference)


def test_negated_views_are_resolved() -> None:
    x = torch.randn(6, 5, dtype=torch.complex64).conj().imag  # memory holds the opposite sign
    assert x.is_neg()
    z, weight = torch.randn(6, 4), torch.randn(4, 5)
    for algorithm in ("gram", "direct", "library"):
        kwargs = {"algorithm": algorithm, "z_is_output": True}
        assert torch.equal(
            ops.correlation(x, z, weight, **kwargs), ops.correlation(x.resolve_neg().clone(), z, weight, **kwargs)
        )


@pytest.mark.parametrize("algorithm", ["gram", "direct", "library", "auto"])
def test_half_precision_sums_do_not_overflow(algorithm: str) -> None:
    x, weight = torch.full((1, 2, 100, 100), 4.0, dtype=torch.float16), torch.full((3, 2, 1, 1), 0.5)
    z = torch.nn.functional.conv2d(x.float(), weight).half()
    d = ops.correlation(x, z, weight, algorithm=algorithm)
    assert torch.equal(d, torch.full_like(weight, 4.0 * 4.0 * 10000))  # fp16 ends at 65504


def test_meta_tensors_give_the_shape() -> None:
    x, weight = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    d = ops.correlation(x, torch.empty(2, 4, 6, 6, device="meta"), weight)
    assert d.shape == weight.shape
    assert d.is_meta
