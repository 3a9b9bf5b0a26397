"""A prefix that learns from some samples of every mini-batch: those whose gradients weigh most where the prefix ends.

The first pass of the prefix keeps nothing. When back-propagation has reached its output, some samples are drawn with probability
proportional to the norms of their gradients there; the prefix runs again for them alone, and their gradients, divided by the
probabilities, go through it: an unbiased estimate of what all samples together would give (importance sampling as in Katharopoulos &
Fleuret 2018, "Not All Samples Are Created Equal"; within a backward pass as in Wang et al. 2024, "Efficient Backpropagation with
Variance-Controlled Adaptive Sampling"). BatchNorm's statistics in the second pass are means with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FLOOR = 0.05  # of the mean norm, added to every norm, so that no weight becomes too large
_ROUNDS = 8  # of capping probabilities at 1


def draw(norms: Tensor, count: int, start: float) -> tuple[Tensor, Tensor]:
    """``count`` of the samples without replacement, each with a probability that grows with its norm (systematic sampling).

    Args:
        norms: ``(n,)``, finite and at least 0.
        count: from 1 to ``n``.
        start: uniform in [0, 1), decides which.
    Returns:
        Indices and the inverses of the probabilities with which they were drawn, ``(count,)`` each.
    """
    scores = norms.double() + FLOOR * norms.double().mean() + torch.finfo(torch.float64).tiny
    certain = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(_ROUNDS):
        rest = scores.masked_fill(certain, 0)
        probability = ((count - certain.sum()) * rest / rest.sum().clamp_min(1e-300)).masked_fill(certain, 1)
        certain |= probability >= 1
    steps = probability.clamp_max(1).cumsum(0)
    steps *= count / steps[-1]  # rounding, and what the last round has left above 1
    probability = steps.diff(prepend=steps.new_zeros(1))
    drawn = torch.searchsorted(steps, start + torch.arange(count, dtype=torch.float64), right=True).clamp_max(len(norms) - 1)
    return drawn, probability[drawn].reciprocal()


def backpropagate(prefix: Iterable[nn.Module], x: Tensor, gradient: Tensor, count: int, start: float) -> None:
    """Add to the gradients of ``prefix``, modules called in turn, what ``count`` samples drawn from ``x`` come to.

    Args:
        gradient: of the loss with respect to the prefix's output, of all samples.
    """
    drawn, weights = draw(gradient.flatten(1).norm(dim=1), count, start)
    weights = weights.to(gradient.dtype)
    y = x[drawn]
    for module in prefix:
        y = weighted_batch_norm(module, y, weights) if isinstance(module, nn.BatchNorm2d) else module(y)
    y.backward(gradient[drawn] * weights.reshape(-1, *[1] * (gradient.dim() - 1)))  # type: ignore[no-untyped-call]


def weighted_batch_norm(norm: nn.BatchNorm2d, x: Tensor, weights: Tensor) -> Tensor:
    """``norm`` in training mode, as if sample ``i`` of ``x``, ``(n, C, H, W)``, were there ``weights[i]`` times; its running
    statistics stay as they are."""
    shares = (weights / (weights.sum() * x[0, 0].numel())).reshape(-1, 1, 1, 1)
    centred = x - (x * shares).sum((0, 2, 3), keepdim=True)
    variance = (centred * centred * shares).sum((0, 2, 3), keepdim=True)
    scaled = centred * (variance + norm.eps).rsqrt()
    return scaled * norm.weight.reshape(-1, 1, 1) + norm.bias.reshape(-1, 1, 1)
