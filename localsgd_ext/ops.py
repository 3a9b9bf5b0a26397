"""The operations: correlation, Hebbian update, normalised write. The sole importer of the compiled module.

Every function has a twin with the same signature in :mod:`localsgd_ext.reference`, which is what runs where no kernel
was compiled for the operands' device. Eager calls go straight to C++; under ``torch.compile``, ``torch.export`` and fake
tensors they go through the registered operators ``torch.ops.localsgd_ext.*``.

Notation: ``W`` is the weight ``[K, C/groups, *kernel]`` (linear: ``[K, C]``), ``x`` the layer's input, ``z`` its
pre-activation output ``conv(x, W) + bias``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localsgd_ext import operands, reference
from localsgd_ext.hooks import under_transform
from localsgd_ext.reference import ALGORITHMS, PADDING_MODES, IntOrTuple, accumulate_dtype

if TYPE_CHECKING:
    from localsgd_ext._C import Plan

__all__ = [
    "ALGORITHMS", "PADDING_MODES", "apply_update_", "benchmark", "correlation", "correlation_of_gram_sums", "gram_sums",
    "hebbian_update_", "is_compiled", "obstacle", "plan"
]  # fmt: skip

benchmark = False
"""Time the eligible algorithms once per geometry, dtypes, layout and thread count instead of trusting the cost model
(what ``torch.backends.cudnn.benchmark`` does for convolutions). Affects ``algorithm="auto"`` only."""

try:
    from localsgd_ext import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]  # every use is behind is_compiled()
    warnings.warn(
        f"localsgd_ext runs on its plain PyTorch reference, which is slower: the compiled module could not be loaded ({error}). "
        "Build it with `pip install --no-build-isolation .` in the source tree; `localsgd doctor` says what is missing.",
        RuntimeWarning,
        stacklevel=2,
    )


def is_compiled(device: str | torch.device = "cpu") -> bool:
    """True if compiled kernels run on ``device``; elsewhere the operations run on :mod:`localsgd_ext.reference`.

    A CUDA device is one for whose architecture the build holds code. ``float64`` operands run on the reference there: the
    kernels sum in ``float32``.
    """
    return _C is not None and not _device_obstacle(torch.device(device))


def obstacle(*tensors: Tensor | None) -> str:
    """Why the operations would take these operands to :mod:`localsgd_ext.reference`, or ``""`` where kernels run."""
    if _C is None:
        return "nothing is compiled"  # type: ignore[unreachable]  # see the import
    device = next(t for t in tensors if t is not None).device
    why = _device_obstacle(device)
    if not why and device.type == _C.gpu and any(t is not None and t.dtype == torch.float64 for t in tensors):
        why = "the kernels do not take float64"
    return why


@functools.cache
def _device_obstacle(device: torch.device) -> str:
    return _C.unavailable(device)


def _on_kernels(*tensors: Tensor | None) -> bool:
    """Whether compiled kernels take these operands; if not, that is said once for each reason."""
    why = obstacle(*tensors)
    if why:
        _say_once(next(t for t in tensors if t is not None).device.type, why)
    return not why


@functools.cache
def _say_once(device_type: str, why: str) -> None:
    if _C is not None and device_type != "meta":  # without a module that was said when it was imported
        warnings.warn(
            f"localsgd_ext runs on its plain PyTorch reference, which is slower, on {device_type}: {why}",
            RuntimeWarning,
            stacklevel=2,
        )


def correlation(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    z_is_output: bool = False,
    algorithm: str = "auto",
) -> Tensor:
    """Return the correlation ``D`` of a layer's input and output: its weight gradient with ``z`` for the output's gradient.

    ``D[k, c, r, s] = sum_{n, p, q} z[n, k, p, q] * x[n, c, p*stride + r*dilation - pad, q*stride + s*dilation - pad]``
    (LoCal+SGD, equation 3). Equivalent to ``torch.nn.grad.conv2d_weight(x, weight.shape, z, ...)``, linear: ``z.T @ x``,
    accumulated in ``float32`` whatever the operands' dtypes (``float64`` if one of them is ``float64``).

    Args:
        x: input, ``[N, C, *spatial]`` or unbatched ``[C, *spatial]``; linear: ``[..., C]``. Any floating dtype and strides.
        z: output ``[N, K, *spatial_out]``, unbatched ``[K, *spatial_out]``; linear: ``[..., K]``. Its dtype may differ from
            ``x``'s. ``None`` means the layer's own output, computed only if the algorithm needs it.
        weight: ``[K, C/groups, *kernel]`` with 1, 2 or 3 kernel dimensions, or ``[K, C]``. Only its shape and dtype matter,
            except to ``"gram"`` and where ``z`` is None.
        bias: the layer's bias ``[K]``; read only by ``"gram"`` and where ``z`` is None.
        stride, padding, dilation, groups, padding_mode: as in ``torch.nn.Conv2d``; ignored by linear layers.
        z_is_output: the caller promises that ``z`` equals ``conv(x, weight) + bias`` up to rounding, so that ``"auto"``
            may choose ``"gram"``, which does not read it.
        algorithm: ``"gram"``: ``W·G + bias ⊗ Σx`` with ``G = XXᵀ``; kernels of size 1 and linear layers only.
            ``"depthwise"``: ``groups == C`` only. ``"winograd"``: minimal filtering (Lavin and Gray, arXiv 1509.09308), 2.25
            to 4 times fewer multiplications, the more output positions the more; on a CPU, and 2-d kernels of 3x3 with a
            stride, dilation and ``groups`` of 1 only.
            ``"direct"``: implicit GEMM in bounded workspace.
            ``"library"``: PyTorch's own weight gradient, which is rounded to bfloat16 where both operands are bfloat16. All
            others give the same bits on every run with the same number of threads, also without
            ``torch.use_deterministic_algorithms``; ``"library"`` does as far as the library does. ``"auto"``: the cheapest
            eligible one, by cost model or, with :data:`benchmark`, by timing; never ``"gram"`` for a ``z`` that was not
            promised to be the output.

    Returns:
        ``D`` with ``weight``'s shape, contiguous, ``float32`` or ``float64``.

    Raises:
        ValueError: shapes that do not fit together, or an explicit ``algorithm`` that this layer is not eligible for.
        TypeError: operands that are not floating point.
    """
    if _through_dispatcher(x, weight):
        numeric, same = _padding_as_ints(padding)
        return torch.ops.localsgd_ext.correlation(  # type: ignore[no-any-return]
            x, z, weight, bias, _ints(stride), numeric, same, _ints(dilation), groups, padding_mode, z_is_output, algorithm
        )
    return _correlation(x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output, algorithm)


def hebbian_update_(
    weight: Tensor,
    x: Tensor,
    z: Tensor | None,
    lr: float | Tensor,
    *,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    z_is_output: bool = False,
    normalize: bool = True,
    algorithm: str = "auto",
    skipped: Tensor | None = None,
) -> None:
    """``W += lr * D / ||D||_2`` in place, ``D = correlation(x, z, weight)`` (LoCal+SGD, equation 4).

    The norm runs over the whole tensor. Where it is 0 or not finite, or ``lr`` is a tensor on a GPU that is not finite,
    ``weight`` is left untouched bit for bit and ``skipped`` is incremented. The caller's grad mode and autocast state do not
    matter; the weight may require grad, and its version counter is bumped, so autograd refuses to back-propagate through the
    value it had before.

    Args:
        weight: the layer's weight, written in place and rounded once to its dtype; any non-overlapping strides.
        lr: signed step size: a float, or a tensor of one element that is read on the device (no synchronisation).
        normalize: ``False`` adds ``lr * D`` (the paper's un-normalised ablation, section 2.1).
        skipped: ``int64`` tensor of one element on the weight's device, or None.

    All other arguments, and the errors raised, are those of :func:`correlation`.
    """
    if _through_dispatcher(x, weight):
        numeric, same = _padding_as_ints(padding)
        value, tensor = _split_lr(lr)
        with torch.no_grad():  # the weight may be a leaf that requires grad
            torch.ops.localsgd_ext.hebbian_update_(
                weight, x, z, value, tensor, bias, _ints(stride), numeric, same, _ints(dilation), groups, padding_mode,
                z_is_output, normalize, algorithm, skipped
            )  # fmt: skip
        return
    _hebbian_update_(
        weight, x, z, lr, bias, stride, padding, dilation, groups, padding_mode, z_is_output, normalize, algorithm, skipped
    )


def apply_update_(
    weights: Sequence[Tensor],
    correlations: Sequence[Tensor],
    lr: float | Tensor,
    *,
    normalize: bool = True,
    skipped: Tensor | None = None,
) -> None:
    """``W += lr * D / ||D||_2`` in place for every pair of ``weights`` and ``correlations`` (LoCal+SGD, equation 4).

    The write alone, for data parallel training (all-reduce the correlations first) and for updates that must wait until
    after the backward pass. Each norm runs over its own tensor and is accumulated in ``float64``.

    Args:
        weights: tensors of any shape and floating dtype, written in place and rounded once; non-overlapping strides.
        correlations: as many tensors, ``float32`` or ``float64``, each with its weight's shape.
        lr: signed step size, as for :func:`hebbian_update_`.
        normalize: ``False`` adds ``lr * D``.
        skipped: ``int64`` tensor of one element, or of one per weight: incremented where a norm is 0 or not finite.

    Raises:
        ValueError: lists of different lengths, shapes that differ, overlapping weights, a ``skipped`` of another size.
        TypeError: a dtype that is not supported.
    """
    given: dict[str, Any] = {"weights": weights, "correlations": correlations}
    for name, value in given.items():
        if isinstance(value, Tensor) or not isinstance(value, Sized):  # a tensor would be taken apart into its rows
            raise TypeError(f"{name} must be a sequence of tensors, got a {type(value).__name__}")
    if weights and _through_dispatcher(correlations[0] if correlations else weights[0], weights[0]):
        number, tensor = _split_lr(lr)
        with torch.no_grad():
            torch.ops.localsgd_ext.apply_update_(list(weights), list(correlations), number, tensor, normalize, skipped)
        return
    _apply_update_(weights, correlations, lr, normalize, skipped)


def gram_sums(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Return the sums over positions that ``D`` is linear in, for a layer of kernel size 1: what processes may add up instead.

    ``D = W·G + bias ⊗ Σx`` with ``G = XXᵀ`` (:func:`correlation_of_gram_sums`), so that the ``D`` of several mini-batches, or shares of
    one, under one ``W`` and ``bias`` is that of their sums. Not for ``torch.compile``; CUDA tensors go to the reference.

    Args:
        weight: only its shape and dtype matter.
        bias: whether there is one matters, not what it is.
    Returns:
        For every group the lower half of ``G``, row by row, then ``Σx`` of all channels where there is a bias:
        ``groups * c * (c + 1) / 2 (+ C)`` numbers with ``c = C / groups``, ``float32`` or ``float64``.
    Raises:
        ValueError, TypeError: as :func:`correlation` with ``algorithm="gram"``.
    """
    if weight.is_cpu and _on_kernels(weight, x):
        return _C.gram_sums(x, weight, bias, stride, padding, dilation, groups, padding_mode)
    return reference.gram_sums(
        x, weight, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode
    )


def correlation_of_gram_sums(sums: Tensor, weight: Tensor, *, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Return ``D`` of a layer, as :func:`correlation` has it, from sums that :func:`gram_sums` made.

    On a CPU with the same bits whatever the number of threads: processes that hold the same sums agree on ``D``.

    Args:
        weight, bias: with the values that the forward multiplied by: under autocast, rounded to its dtype.
    Raises:
        ValueError, TypeError: ``sums`` of another size or dtype, a weight that is not of kernel size 1.
    """
    if sums.is_cpu and _on_kernels(sums, weight):
        return _C.correlation_of_gram_sums(sums, weight, bias, groups)
    return reference.correlation_of_gram_sums(sums, weight, bias=bias, groups=groups)


def plan(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    z_is_output: bool = False,
) -> Plan:
    """Return which algorithm ``algorithm="auto"`` picks for these operands, the alternatives with their cost, and why.

    The arguments are those of :func:`correlation`. With :data:`benchmark` the eligible algorithms are timed, once.

    Raises:
        RuntimeError: there is no compiled kernel for the operands' device, hence nothing to choose from.
    """
    if why := obstacle(weight, x, z):
        raise RuntimeError(
            f"no kernels are compiled for device {weight.device}: the reference runs there and has no alternatives ({why})"
        )
    return _C.plan(x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output, benchmark)


# ---- eager ----------------------------------------------------------------------------------------------------------


def _correlation(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    algorithm: str,
) -> Tensor:
    if _on_kernels(weight, x, z):
        try:
            return _C.correlation(
                x, z, weight, bias, stride, padding, dilation, groups, padding_mode, z_is_output, algorithm, benchmark
            )
        except TypeError as error:
            raise operands.named(error, {
                "x": x, "z": z, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "dilation": dilation,
                "groups": groups, "padding_mode": padding_mode, "z_is_output": z_is_output, "algorithm": algorithm
            }) from None  # fmt: skip
    return reference.correlation(
        x, z, weight, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        z_is_output=z_is_output, algorithm=algorithm
    )  # fmt: skip


def _hebbian_update_(
    weight: Tensor,
    x: Tensor,
    z: Tensor | None,
    lr: float | Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    normalize: bool,
    algorithm: str,
    skipped: Tensor | None,
) -> None:
    if _on_kernels(weight, x, z):
        try:
            _C.hebbian_update_(
                weight, x, z, lr, bias, stride, padding, dilation, groups, padding_mode, z_is_output, normalize, algorithm,
                skipped, benchmark
            )  # fmt: skip
        except TypeError as error:
            raise operands.named(error, {
                "weight": weight, "x": x, "z": z, "lr": lr, "bias": bias, "stride": stride, "padding": padding,
                "dilation": dilation, "groups": groups, "padding_mode": padding_mode, "z_is_output": z_is_output,
                "normalize": normalize, "algorithm": algorithm, "skipped": skipped
            }) from None  # fmt: skip
        return
    reference.hebbian_update_(
        weight, x, z, lr, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
        z_is_output=z_is_output, normalize=normalize, algorithm=algorithm, skipped=skipped
    )  # fmt: skip


def _apply_update_(
    weights: Sequence[Tensor], correlations: Sequence[Tensor], lr: float | Tensor, normalize: bool, skipped: Tensor | None
) -> None:
    if all(_on_kernels(*pair) for pair in zip(weights, correlations, strict=False)) and _C is not None:
        _C.apply_update_(list(weights), list(correlations), lr, normalize, skipped)
    else:
        reference.apply_update_(weights, correlations, lr, normalize=normalize, skipped=skipped)


# ---- torch.compile: the same calls as registered operators -------------------------------------------------------------


def _through_dispatcher(*tensors: Tensor) -> bool:
    """Tracing needs an operator with a fake kernel; so do tensor subclasses, whose data pointer is not theirs to read."""
    if torch.compiler.is_compiling():
        return True
    if under_transform():
        raise RuntimeError(
            "correlation, hebbian_update_ and apply_update_ cannot run under a torch.func transform (vmap, grad, jvp, ...): "
            "they read and write memory; call them outside of it"
        )
    unusual = [t for t in tensors if type(t) not in (Tensor, torch.nn.Parameter)]
    for t in unusual:
        if not isinstance(t, Tensor):
            raise TypeError(f"x, weights and correlations must be tensors, got {type(t).__name__}")
    return bool(unusual)


def _ints(value: IntOrTuple) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _padding_as_ints(padding: IntOrTuple | str) -> tuple[list[int], bool]:
    """An operator's schema has no ``int | str``: (ints, is it 'same')."""
    if not isinstance(padding, str):
        return _ints(padding), False
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
    return [0], padding == "same"


def _split_lr(lr: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)


def _spread(value: Sequence[int]) -> IntOrTuple:
    """One int stands for all dimensions."""
    return value[0] if len(value) == 1 else tuple(value)


# Not to be recorded by torch.compile's own CUDA graphs ("reduce-overhead"), whose memory pools may hold no workspace of ours.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("localsgd_ext::correlation", mutates_args=(), tags=_TAGS)
def _correlation_op(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    same: bool,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    algorithm: str,
) -> Tensor:
    pad = "same" if same else _spread(padding)
    return _correlation(
        x, z, weight, bias, _spread(stride), pad, _spread(dilation), groups, padding_mode, z_is_output, algorithm
    )


@_correlation_op.register_fake
def _(x: Tensor, z: Tensor | None, weight: Tensor, *_args: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=accumulate_dtype(x, z, weight), device=weight.device)


@torch.library.custom_op("localsgd_ext::hebbian_update_", mutates_args=("weight", "skipped"), tags=_TAGS)
def _hebbian_update_op(
    weight: Tensor,
    x: Tensor,
    z: Tensor | None,
    lr: float,
    lr_tensor: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    same: bool,
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    z_is_output: bool,
    normalize: bool,
    algorithm: str,
    skipped: Tensor | None,
) -> None:
    _hebbian_update_(
        weight, x, z, lr if lr_tensor is None else lr_tensor, bias, _spread(stride), "same" if same else _spread(padding),
        _spread(dilation), groups, padding_mode, z_is_output, normalize, algorithm, skipped
    )  # fmt: skip


@_hebbian_update_op.register_fake
def _(*_args: Any) -> None:
    return None


@torch.library.custom_op("localsgd_ext::apply_update_", mutates_args=("weights", "skipped"), tags=_TAGS)
def _apply_update_op(
    weights: Sequence[Tensor],
    correlations: Sequence[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    normalize: bool,
    skipped: Tensor | None,
) -> None:
    _apply_update_(weights, correlations, lr if lr_tensor is None else lr_tensor, normalize, skipped)


@_apply_update_op.register_fake
def _(*_args: Any) -> None:
    return None
