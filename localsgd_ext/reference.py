"""The operations in plain PyTorch: what every kernel must agree with.

Each function has the same signature as its twin in :mod:`localsgd_ext.ops`. Nothing here is fused, nothing is compiled;
it runs on every device PyTorch runs on, and in ``float64`` it is the oracle of the tests.

Notation: ``W`` is the weight ``[K, C/groups, *kernel]`` (linear: ``[K, C]``), ``x`` the layer's input, ``z`` its
pre-activation output ``conv(x, W) + bias``. The *correlation* ``D`` is the layer's weight gradient with ``z`` in the place
of the output's gradient (paper, equation 3)::

    D[k, c, r, s] = sum_{n, p, q}  z[n, k, p, q] * x[n, c, p*stride + r*dilation - pad, q*stride + s*dilation - pad]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALGORITHMS = ("auto", "gram", "direct", "depthwise", "winograd", "library")
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

IntOrTuple = int | Sequence[int]


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
    """Return the correlation ``D`` of a layer's input and output (paper, equation 3); see :func:`localsgd_ext.ops.correlation`."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    with torch.no_grad(), _no_autocast(x.device.type):
        x, z, geometry = _canonical(
            x, z, weight, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode
        )
        dtype = accumulate_dtype(x, z, weight)
        if algorithm == "gram":
            return _gram_correlation(x.to(dtype), z, weight, bias, geometry)
        if algorithm == "depthwise" and not (weight.dim() > 2 and groups > 1 and weight.shape[1] == 1):
            raise ValueError(
                f"algorithm 'depthwise' needs groups == in_channels > 1, got weight of shape {tuple(weight.shape)} "
                f"and groups={groups}"
            )
        if algorithm == "winograd" and not _winograd_fits(weight, geometry):
            raise ValueError(
                "algorithm 'winograd' needs a 2-d kernel of 3x3, stride, dilation and groups of 1, got weight of shape "
                f"{tuple(weight.shape)}, stride={geometry.stride}, dilation={geometry.dilation} and groups={groups}"
            )
        if z is None:
            z = _forward(x, weight, bias, geometry)
        return _weight_grad(x.to(dtype), z.to(dtype), weight, geometry).contiguous()


def apply_update_(
    weights: Sequence[Tensor],
    correlations: Sequence[Tensor],
    lr: float | Tensor,
    *,
    normalize: bool = True,
    skipped: Tensor | None = None,
) -> None:
    """``W += lr * D / ||D||_2`` for every pair (paper, equation 4); see :func:`localsgd_ext.ops.apply_update_`."""
    if len(weights) != len(correlations):
        raise ValueError(f"weights and correlations must have the same length, got {len(weights)} and {len(correlations)}")
    for i, (weight, d) in enumerate(zip(weights, correlations, strict=True)):
        _check_weight(weight)
        if d.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"correlations[{i}] must be float32 or float64, got {d.dtype}")
        if weight.shape != d.shape:
            raise ValueError(f"correlations[{i}] must have shape {tuple(weight.shape)}, got {tuple(d.shape)}")
        if not d.device == weight.device == weights[0].device:
            raise ValueError(
                f"weights[{i}] and correlations[{i}] must be on {weights[0].device}, got {weight.device} and {d.device}"
            )
    if weights:
        _check_scalars(lr, skipped, weights)
    step = lr.reshape(()).to(torch.float64) if isinstance(lr, Tensor) else lr
    with torch.no_grad():
        for i, (weight, d) in enumerate(zip(weights, correlations, strict=True)):
            # In fp64 neither squares nor sums nor lr / norm can overflow or vanish.
            wide = d.to(torch.float64)
            norm = torch.linalg.vector_norm(wide)
            usable = torch.isfinite(norm) & (norm > 0)
            if isinstance(step, Tensor):  # on a device it is not waited for, so it may be anything
                usable &= torch.isfinite(step)
            scale = step / norm if normalize else step
            weight.copy_(torch.where(usable, (weight.to(torch.float64) + scale * wide).to(weight.dtype), weight))
            if skipped is not None:
                skipped.view(-1)[i if skipped.numel() > 1 else 0].add_(~usable)


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
    """``W += lr * D / ||D||_2`` in place, ``D = correlation(x, z)``; see :func:`localsgd_ext.ops.hebbian_update_`."""
    _check_weight(weight)
    d = correlation(
        x,
        z,
        weight,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        z_is_output=z_is_output,
        algorithm=algorithm,
    )
    apply_update_([weight], [d], lr, normalize=normalize, skipped=skipped)


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
    """Return the lower halves of ``XXᵀ``, and ``Σx`` where there is a bias; see :func:`localsgd_ext.ops.gram_sums`."""
    with torch.no_grad(), _no_autocast(x.device.type):
        x, _, geometry = _canonical(
            x,
            None,
            weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
        )
        rows = _rows(x.to(accumulate_dtype(x, None, weight)), weight, geometry)
        lower = torch.tril_indices(rows.shape[2], rows.shape[2], device=rows.device)
        halves = torch.einsum("mgc,mgd->gcd", rows, rows)[:, lower[0], lower[1]].flatten()
        return halves if bias is None else torch.cat([halves, rows.sum(0).flatten()])


def gram_sums_size(weight: Tensor, bias: Tensor | None, groups: int) -> int:
    """How many numbers :func:`gram_sums` returns for a layer of kernel size 1."""
    channels = weight.shape[1]
    return groups * channels * (channels + 1) // 2 + (0 if bias is None else groups * channels)


def correlation_of_gram_sums(sums: Tensor, weight: Tensor, *, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Return ``W·G + bias ⊗ Σx``; see :func:`localsgd_ext.ops.correlation_of_gram_sums`."""
    if weight.dim() < 2 or any(k != 1 for k in weight.shape[2:]) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"weight must have a kernel of size 1 and {groups} groups of rows, got shape {tuple(weight.shape)}")
    channels = weight.shape[1]
    wanted = gram_sums_size(weight, bias, groups)
    if sums.shape != (wanted,):
        raise ValueError(f"sums must have shape ({wanted},), got {tuple(sums.shape)}")
    if sums.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"sums must be float32 or float64, got {sums.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    with torch.no_grad(), _no_autocast(sums.device.type):
        size = gram_sums_size(weight, None, groups)
        halves, of_x = sums[:size], sums[size:]
        lower = torch.tril_indices(channels, channels, device=sums.device)
        gram = sums.new_empty(groups, channels, channels)
        gram[:, lower[0], lower[1]] = gram[:, lower[1], lower[0]] = halves.view(groups, -1)
        return _times_gram(weight, bias, gram, of_x.view(groups, -1) if bias is not None else None).reshape(weight.shape)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    known = torch.amp.is_autocast_available(device_type)  # not on meta, for one
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


class _Geometry:
    """A convolution's arguments as tuples, ``padding`` numeric and symmetric (anything else is padded beforehand)."""

    def __init__(self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups


def accumulate_dtype(x: Tensor, z: Tensor | None, weight: Tensor) -> torch.dtype:
    tensors = [t for t in (x, z, weight) if t is not None]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _tuple(value: IntOrTuple, dims: int, name: str, least: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"{name} must be an int or {dims} ints, got {value!r}")
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, got {values}")
    return values


def _check_floating(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_weight(weight: Tensor) -> None:
    _check_floating(weight, "weight")
    if _may_overlap(weight):
        raise ValueError(
            f"weight must not overlap itself in memory, got shape {tuple(weight.shape)} with strides {weight.stride()}"
        )


def _may_overlap(t: Tensor) -> bool:
    """Sufficient, not necessary: walked from the smallest stride up, no dimension steps back into the one before."""
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def _check_scalars(lr: float | Tensor, skipped: Tensor | None, weights: Sequence[Tensor]) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a float or a tensor of one element, got shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not math.isfinite(lr):  # one on a device is not waited for
        raise ValueError(f"lr must be finite, got {lr}")
    if skipped is None:
        return
    if skipped.dtype != torch.int64:
        raise TypeError(f"skipped must be int64, got {skipped.dtype}")
    if skipped.device != weights[0].device:
        raise ValueError(f"skipped must be on the weight's device {weights[0].device}, got {skipped.device}")
    if skipped.dim() > 1 or skipped.numel() not in (1, len(weights)):
        raise ValueError(f"skipped must have 1 element or one per weight, got shape {tuple(skipped.shape)}")


def _check_output(z: Tensor | None, expected: tuple[int, ...]) -> None:
    if z is not None and tuple(z.shape) != expected:
        raise ValueError(f"z must have shape {expected}, got {tuple(z.shape)}")


def _canonical(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Tensor | None, _Geometry]:
    """Batched, explicitly padded operands; a linear layer becomes ``x [M, C]``, ``z [M, K]``."""
    dims = weight.dim() - 2
    for name, tensor in (("weight", weight), ("x", x), ("z", z), ("bias", bias)):
        if tensor is not None:
            _check_floating(tensor, name)
            if tensor.device != weight.device:
                raise ValueError(f"{name} must be on the weight's device {weight.device}, got {tensor.device}")
    if dims not in (0, 1, 2, 3):
        raise ValueError(f"weight must have 2 (linear), 3, 4 or 5 (conv) dimensions, got shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    if dims == 0:
        if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"x must have shape (..., {weight.shape[1]}) for a weight of shape {tuple(weight.shape)}, got {tuple(x.shape)}"
            )
        _check_output(z, (*x.shape[:-1], weight.shape[0]))
        rows = x.reshape(-1, x.shape[-1])
        return rows, None if z is None else z.reshape(-1, weight.shape[0]), _Geometry((), (), (), 1)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must be positive and divide weight.shape[0] = {weight.shape[0]}, got {groups}")
    if x.dim() not in (dims + 1, dims + 2):
        raise ValueError(
            f"x must have {dims + 2} dimensions ({dims + 1} if unbatched) for a weight of shape {tuple(weight.shape)}, "
            f"got shape {tuple(x.shape)}"
        )
    if x.shape[-dims - 1] != weight.shape[1] * groups:
        raise ValueError(
            f"x must have {weight.shape[1] * groups} channels (weight.shape[1] * groups), got shape {tuple(x.shape)}"
        )
    strides, dilations = _tuple(stride, dims, "stride", 1), _tuple(dilation, dims, "dilation", 1)
    pads = _padding_pairs(padding, weight.shape[2:], strides, dilations)
    room = [
        n + before + after - d * (k - 1) - 1
        for n, (before, after), d, k in zip(x.shape[-dims:], pads, dilations, weight.shape[2:], strict=True)
    ]
    if min(room) < 0:
        raise ValueError(
            f"x of shape {tuple(x.shape)} is smaller than the kernel of weight {tuple(weight.shape)} after padding"
        )
    outputs = [r // s + 1 for r, s in zip(room, strides, strict=True)]
    _check_output(z, (*x.shape[: -dims - 1], weight.shape[0], *outputs))
    if x.dim() == dims + 1:
        x, z = x.unsqueeze(0), None if z is None else z.unsqueeze(0)
    if x.numel() == 0 or (padding_mode == "zeros" and all(before == after for before, after in pads)):
        return x, z, _Geometry(strides, tuple(before for before, _ in pads), dilations, groups)
    flat = [side for pair in reversed(pads) for side in pair]  # F.pad starts at the last dimension
    x = F.pad(x, flat) if padding_mode == "zeros" else F.pad(x, flat, mode=padding_mode)
    return x, z, _Geometry(strides, (0,) * dims, dilations, groups)


def _padding_pairs(
    padding: IntOrTuple | str, kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension, as ``nn.Conv*`` pads for ints, ``'same'`` and ``'valid'``."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
        if padding == "same" and max(stride) > 1:
            raise ValueError(f"padding 'same' needs stride 1, got {stride}")
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _tuple(padding, len(kernel), "padding", 0)]


def _winograd_fits(weight: Tensor, g: _Geometry) -> bool:
    return weight.shape[2:] == (3, 3) and g.groups == 1 and set(g.stride) == set(g.dilation) == {1}


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: _Geometry) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not g.stride:
        return F.linear(x, weight, bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(g.stride) - 1]
    return conv(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def _weight_grad(x: Tensor, z: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
    if not g.stride:
        return z.t() @ x
    like = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    dims = len(g.stride)
    if x.shape[0] == 0:
        return torch.zeros_like(like)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        z, x, like, None, g.stride, g.padding, g.dilation, False, [0] * dims, g.groups, [False, True, False]
    )[1]
    return gradient


def _gram_correlation(x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, g: _Geometry) -> Tensor:
    """``D = W·G + bias ⊗ Σx`` with ``G = XXᵀ``: exact where every output reads one input position (1x1 kernels, linear)."""
    rows = _rows(x, weight, g)
    # The forward rounded W and b to its compute dtype, which is z's wherever that is lower (autocast).
    seen = [p if p is None or z is None or z.dtype.itemsize >= p.dtype.itemsize else p.to(z.dtype) for p in (weight, bias)]
    assert seen[0] is not None
    gram = torch.einsum("mgc,mgd->gcd", rows, rows)
    return _times_gram(seen[0], seen[1], gram, None if bias is None else rows.sum(0)).reshape(weight.shape)


def _rows(x: Tensor, weight: Tensor, g: _Geometry) -> Tensor:
    """What a layer of kernel size 1 multiplies by its weight: ``[M, groups, C/groups]``, but for rows of zeros."""
    if any(k != 1 for k in weight.shape[2:]):
        raise ValueError(
            f"algorithm 'gram' needs a kernel of size 1 or a linear layer, got weight of shape {tuple(weight.shape)}"
        )
    for dim, (stride, pad) in enumerate(zip(g.stride, g.padding, strict=True)):
        first = -(-pad // stride) * stride - pad  # positions inside the zero padding contribute nothing
        x = x[(slice(None),) * (2 + dim) + (slice(first, None, stride),)]
    return x.movedim(1, -1).reshape(-1, g.groups, x.shape[1] // g.groups) if g.stride else x.unsqueeze(1)


def _times_gram(weight: Tensor, bias: Tensor | None, gram: Tensor, sums: Tensor | None) -> Tensor:
    """``[groups, K/groups, C/groups]``, from ``gram [groups, C/groups, C/groups]`` and, with a bias, ``sums [groups, C/groups]``."""
    w = weight.to(gram.dtype).reshape(gram.shape[0], -1, gram.shape[2])
    d = torch.einsum("gkc,gcd->gkd", w, gram)
    if bias is not None:
        assert sums is not None
        d = d + bias.to(gram.dtype).reshape(d.shape[0], -1, 1) * sums.unsqueeze(1)
    return d
