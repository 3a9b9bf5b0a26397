"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382): a training step leaves out the branches of some residual blocks.

A whole mini-batch shares the decision, so that a dropped branch is not computed at all, forward or backward. The scaling is that of
torchvision, whose module makes the decision: a branch that survives is divided by its survival probability in training, and nothing
is scaled at test time (the paper multiplies at test time instead; the expectation is the same). The trained network is thus the
plain one, with the plain one's parameter names.
"""

from __future__ import annotations

import types
from collections.abc import Callable
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


# A block computes end(branch(x) + shortcut(x)): its branch, its shortcut, its end.
_PARTS: dict[type[nn.Module], tuple[_Part, _Part, _Part]] = {
    BasicBlock: (BasicBlock.branch, lambda block, x: block.shortcut(x), _relu),
    TorchvisionBasicBlock: (_basic_branch, _projection, _relu),
    Bottleneck: (_bottleneck_branch, _projection, _relu),
    InvertedResidual: (lambda block, x: block.conv(x), lambda block, x: x, lambda block, x: x),
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

    def _forward(self, name: str, parts: tuple[_Part, _Part, _Part]) -> _Part:
        branch, shortcut, end = parts

        def forward(block: Any, x: Tensor) -> Tensor:
            scale = float(
                block.stochastic_depth(torch.ones(1))
            )  # 0 or 1 / p, 1 in evaluation; on the CPU: nothing waits for a GPU
            if scale == 0:
                self.dropped.add(name)
                return end(block, shortcut(block, x))
            y = branch(block, x)
            return end(block, (y if scale == 1 else y * scale) + shortcut(block, x))

        return forward

    def block_of(self, layer: str) -> str | None:
        """The block whose branch has the layer of this name, ``None`` if it is in no branch."""
        for name in self.blocks:
            if layer.startswith(f"{name}.") and not layer.startswith(f"{name}.downsample."):
                return name
        return None

    def fill_gradients(self) -> None:
        """Zero gradients for the branches left out, as if their outputs had been multiplied by 0.

        Momentum and weight decay go on moving them: in the paper's code, and wherever torchvision's module does the dropping.
        """
        for block in self.blocks.values():
            for parameter in block.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


def _is_residual(module: nn.Module) -> bool:
    return type(module) in _PARTS and getattr(module, "use_res_connect", True)
