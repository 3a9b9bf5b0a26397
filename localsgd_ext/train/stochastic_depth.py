"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): a training step leaves out the branches of some residual blocks.

A whole mini-batch shares the decision, which torchvision's module makes, so that a branch left out is not computed at all, forward or
backward. The scaling is the paper's: none in training, and at test time a branch is multiplied by its survival probability.
torchvision divides by it in training instead, for the same expectation; in short runs that learns less (see ``presets.py``).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock as TorchvisionBasicBlock
from torchvision.models.resnet import Bottleneck
from torchvision.ops import StochasticDepth

from localsgd_ext.train.models import BasicBlock

_Part = Callable[[Any, Tensor], Tensor]


def _basic_branch(block: Any, x: Tensor) -> Tensor:
    y: Tensor = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    return y


def _bottleneck_branch(block: Any, x: Tensor) -> Tensor:
    y = block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x))))))
    z: Tensor = block.bn3(block.conv3(y))
    return z


def _projection(block: Any, x: Tensor) -> Tensor:
    y: Tensor = x if block.downsample is None else block.downsample(x)
    return y


def _relu(block: Any, x: Tensor) -> Tensor:
    return F.relu(x)  # block.relu works in place: on the input itself, where the branch is left out


@dataclass(frozen=True)
class _Parts:
    """A block computes ``end(branch(x) + shortcut(x))``; its branch ends with the normalisation ``last``."""

    branch: _Part
    shortcut: _Part
    end: _Part
    last: Callable[[Any], nn.BatchNorm2d]


_PARTS: dict[type[nn.Module], _Parts] = {
    BasicBlock: _Parts(BasicBlock.branch, lambda block, x: block.shortcut(x), _relu, lambda block: block.bn2),
    TorchvisionBasicBlock: _Parts(_basic_branch, _projection, _relu, lambda block: block.bn2),
    Bottleneck: _Parts(_bottleneck_branch, _projection, _relu, lambda block: block.bn3),
    InvertedResidual: _Parts(
        lambda block, x: block.conv(x), lambda block, x: x, lambda block, x: x, lambda block: block.conv[-1]
    ),
}


class ResidualBranches:
    """Makes every residual block of ``model`` drop its branch at random; block ``l`` of ``L`` keeps it with probability
    ``1 - l / L * (1 - survival)`` (the paper's linear decay).

    The decisions are drawn from PyTorch's global generator of the CPU, one a block and training forward, in the order of the blocks.

    Raises:
        ValueError: the network has no residual block of a known kind.
    """

    def __init__(self, model: nn.Module, survival: float) -> None:
        blocks = {name: module for name, module in model.named_modules() if _is_residual(module)}
        if not blocks:
            raise ValueError(f"stochastic depth needs residual blocks of a known kind, {type(model).__name__} has none")
        self.blocks: dict[str, nn.Module] = blocks
        self.dropped: set[str] = set()
        """Names of the blocks whose branches were left out since this was last cleared."""
        for number, (name, block) in enumerate(blocks.items(), start=1):
            block.stochastic_depth = StochasticDepth(number / len(blocks) * (1 - survival), "batch")
            block.forward = types.MethodType(self._forward(name, _PARTS[type(block)]), block)

    def _forward(self, name: str, parts: _Parts) -> _Part:
        def forward(block: Any, x: Tensor) -> Tensor:
            keep = block.stochastic_depth
            if not block.training:
                return parts.end(block, parts.branch(block, x) * (1 - keep.p) + parts.shortcut(block, x))
            if not keep(torch.ones(1)):  # 0 or 1 / p, on the CPU: nothing waits for a GPU
                self.dropped.add(name)
                return parts.end(block, parts.shortcut(block, x))
            return parts.end(block, parts.branch(block, x) + parts.shortcut(block, x))

        return forward

    @torch.no_grad()
    def fold_(self) -> None:
        """Scale the last normalisations instead of the branches, for good: the weights are then those of the plain network."""
        for block in self.blocks.values():
            keep: Any = block.stochastic_depth
            last = _PARTS[type(block)].last(block)
            last.weight.mul_(1 - keep.p)
            last.bias.mul_(1 - keep.p)
            keep.p = 0.0

    def block_of(self, layer: str) -> str | None:
        """The block whose branch has the layer of this name, ``None`` if it is in no branch."""
        for name in self.blocks:
            if layer.startswith(f"{name}.") and not layer.startswith(f"{name}.downsample."):
                return name
        return None

    def fill_gradients(self) -> None:
        """Zero gradients for the branches left out, as if their outputs had been multiplied by 0: momentum and weight decay go on
        moving them, as they do in the paper's code.
        """
        for block in self.blocks.values():
            for parameter in block.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


def _is_residual(module: nn.Module) -> bool:
    return type(module) in _PARTS and getattr(module, "use_res_connect", True)
