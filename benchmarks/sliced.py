"""A training forward whose prefix keeps only a slice of the mini-batch for the backward pass.

The prefix sees the whole mini-batch, as two parts: activations of the first are part of the graph, those of the second are
constants. BatchNorm takes its statistics over both, so the outputs are plain training's, and gradients those of the loss with the
second part held fixed. For the two small networks of :mod:`localsgd_ext.train.models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsgd_ext.train.models import BasicBlock

Parts = tuple[Tensor, Tensor]
"""Learning and constant."""


def forward(model: nn.Sequential, x: Tensor, children: int, learning: int) -> Tensor:
    """``model(x)``, whose first ``children`` modules back-propagate through ``x[:learning]`` alone."""
    parts = x[:learning], x[learning:]
    for child in list(model)[:children]:
        parts = _split(child, parts)
    y = torch.cat(parts)
    for child in list(model)[children:]:
        y = child(y)
    return y


def _split(module: nn.Module, parts: Parts) -> Parts:
    if isinstance(module, nn.Sequential):
        for child in module:
            parts = _split(child, parts)
        return parts
    if isinstance(module, BasicBlock):
        y = _both(F.relu, _batch_norm(module.bn1, _both(module.conv1, parts)))
        y = _batch_norm(module.bn2, _both(module.conv2, y))
        shortcut = _both(module.shortcut, parts)
        return _both(F.relu, (y[0] + shortcut[0], y[1] + shortcut[1]))
    return _batch_norm(module, parts) if isinstance(module, nn.BatchNorm2d) else _both(module, parts)


def _both(function: Callable[[Tensor], Tensor], parts: Parts) -> Parts:
    learning = function(parts[0])
    with torch.no_grad():
        return learning, function(parts[1])


def _batch_norm(norm: nn.BatchNorm2d, parts: Parts) -> Parts:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    over = (0, 2, 3)
    count = sum(part.numel() for part in parts) / norm.num_features
    mean = (parts[0].sum(over) + parts[1].sum(over)) / count
    centred = tuple(part - mean.view(1, -1, 1, 1) for part in parts)
    variance = (centred[0].square().sum(over) + centred[1].square().sum(over)) / count
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
        norm.num_batches_tracked += 1
    scale = (norm.weight * torch.rsqrt(variance + norm.eps)).view(1, -1, 1, 1)
    shift = norm.bias.view(1, -1, 1, 1)
    with torch.no_grad():
        constant = centred[1] * scale + shift
    return centred[0] * scale + shift, constant
