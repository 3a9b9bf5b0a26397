"""A rotating part of each mini-batch: what the local updates see with ``sample < 1``.

The part is a slice along the first dimension, so nothing is copied. Of ``N`` images it holds ``max(1, round(sample * N))``; the
slices of consecutive mini-batches lie evenly spread from the first image to the last and begin again after
``ceil(N / images)`` mini-batches, in which every place in the batch had its turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import require_numbers
from .reference import accumulate_dtype


def check_sample(sample: object) -> float:
    """Return ``sample`` as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not in (0, 1].
    """
    require_numbers(sample=sample)
    value = float(sample)  # type: ignore[arg-type]
    if not 0 < value <= 1:
        raise ValueError(f"sample must be in (0, 1], got {sample}")
    return value


def sampled_range(images: int, sample: float, turn: int) -> tuple[int, int]:
    """First image and number of images of the part whose turn it is, among ``images``."""
    count = min(images, max(1, round(sample * images)))
    if count == images:
        return 0, images
    parts = -(-images // count)  # at least 2
    return (turn % parts) * (images - count) // (parts - 1), count


def sampled(weight: Tensor, x: Tensor, z: Tensor, sample: float, turn: int) -> tuple[Tensor, Tensor]:
    """The same part of a layer's input and of its output, as views; all of an unbatched input."""
    if x.dim() < max(2, weight.dim()):  # [C, *space]; linear: [C]
        return x, z
    start, count = sampled_range(x.shape[0], sample, turn)
    return x.narrow(0, start, count), z.narrow(0, start, count)


def sampled_correlation(
    weight: Tensor,
    x: Tensor,
    z: Tensor,
    sample: float,
    turn: Tensor,
    *,
    bias: Tensor | None,
    z_is_output: bool,
    algorithm: str,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The correlation of the part whose turn it is, as one operator: a compiled graph need not know which part that is.

    ``turn`` is an ``int64`` tensor of one element on the CPU. The other arguments are those of
    :func:`localsgd_ext.ops.correlation`.
    """
    numeric, same = ([0], padding == "same") if isinstance(padding, str) else (padding, False)
    return torch.ops.localsgd_ext.sampled_correlation(  # type: ignore[no-any-return]
        x, z, weight, turn, sample, bias, stride, numeric, same, dilation, groups, padding_mode, z_is_output, algorithm
    )


# Not for torch.compile's own CUDA graphs: the turn is read on the host.
@torch.library.custom_op("localsgd_ext::sampled_correlation", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _sampled_correlation_op(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    turn: Tensor,
    sample: float,
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
    x, z = sampled(weight, x, z, sample, int(turn))
    return torch.ops.localsgd_ext.correlation(  # type: ignore[no-any-return]
        x, z, weight, bias, stride, padding, same, dilation, groups, padding_mode, z_is_output, algorithm
    )


@_sampled_correlation_op.register_fake
def _(x: Tensor, z: Tensor, weight: Tensor, *_args: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=accumulate_dtype(x, z, weight), device=weight.device)
