"""PruneTrain (Lym et al. 2019, arXiv 1901.09290): group lasso while training, and every few epochs the channels that it has emptied go.

Regularised are, as in the authors' code, the output and the input channels of every convolution that is not depthwise, less the
colours of the pictures, and the inputs of the classifier; all groups have the same coefficient. A channel goes when nothing that
makes it and nothing that reads it has a weight of 1e-4 or more: where shortcuts join layers, that is all of the layers joined (the
paper's union). Removing whole layers is left out: a layer keeps at least one channel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from localsgd_ext.train.models import BasicBlock, PadShortcut

THRESHOLD = 1e-4
_EPSILON = 1e-8  # under the square root, as in the authors' code: at 0 the gradient is 0


def check_installed() -> None:
    """Raises ``ValueError`` without the package that removes the channels, which no other method needs."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise ValueError("--method prunetrain needs torch_pruning: pip install torch-pruning")


class GroupLasso:
    """``coefficient * sum over groups of ||w_group||``, for plain SGD: :meth:`add_gradient_` between backward and step.

    Args:
        ratio: share of the lasso in the total loss that :meth:`set_coefficient` aims at.
    """

    def __init__(self, model: nn.Module, ratio: float) -> None:
        self.model, self.ratio = model, ratio
        self.coefficient: float | None = None

    def _weights(self) -> Iterator[tuple[Tensor, bool, bool]]:
        """Weights, whether their outputs are groups, whether their inputs are."""
        stem = True
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                yield module.weight, True, not stem
                stem = False
            elif isinstance(module, nn.Linear):
                yield module.weight, False, True

    @torch.no_grad()
    def value(self) -> float:
        """The sum of the groups' norms, without the coefficient."""
        norms = []
        for weight, outputs, inputs in self._weights():
            squares = _squares(weight)
            norms += [squares.sum(1)] * outputs + [squares.sum(0)] * inputs
        return float(torch.cat(norms).add_(_EPSILON).sqrt_().double().sum())

    def set_coefficient(self, loss: float) -> None:
        """Such that the lasso is ``ratio`` of the total, now that the rest of it is ``loss``: in the first iteration."""
        self.coefficient = self.ratio / (1 - self.ratio) * loss / self.value()

    @torch.no_grad()
    def add_gradient_(self) -> None:
        """Add the lasso's gradient to the weights' gradients."""
        assert self.coefficient is not None
        for weight, outputs, inputs in self._weights():
            assert weight.grad is not None
            squares = _squares(weight)  # [K, C]
            scale = torch.zeros_like(squares)
            if outputs:
                scale += (squares.sum(1, keepdim=True) + _EPSILON).rsqrt_()
            if inputs:
                scale += (squares.sum(0, keepdim=True) + _EPSILON).rsqrt_()
            weight.grad.addcmul_(weight, scale.reshape(*scale.shape, *(1,) * (weight.dim() - 2)), value=self.coefficient)


def _squares(weight: Tensor) -> Tensor:
    """``[K, C, R, S]`` or ``[K, C]``: sums of squares ``[K, C]``."""
    return weight.square().flatten(2).sum(2) if weight.dim() > 2 else weight.square()


def reconfigure(
    model: nn.Module, optimizer: torch.optim.Optimizer, example: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> int:
    """Remove the channels of ``model`` that are empty and return how many went; parameters and momentum of the others stay.

    Parameters that become smaller are new ones: ``optimizer`` is told, other holders of them are not.

    Args:
        example: a mini-batch for tracing.
        layout: memory format of the weights.
    """
    import torch_pruning

    before = dict(model.named_parameters())
    for parameter in before.values():  # torch-pruning prunes a gradient with its parameter: momentum travels as one
        parameter.grad = optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example, customized_pruners={PadShortcut: _pad_pruner()}, verbose=False
    )
    _map_padded_channels(graph)
    removed = 0
    # Those of the later stages first: a padded shortcut carries the first channels of a later stage to an earlier one, and indices
    # must not have moved when it is their turn.
    for conv, empty in reversed(list(_empty_channels(graph, model))):
        graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, empty).prune()
        removed += len(empty)
    exchange(optimizer, before, dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        momentum, parameter.grad = parameter.grad, None
        if parameter is not before[name]:
            parameter.data = _laid_out(parameter.data, layout)
            momentum = None if momentum is None else _laid_out(momentum, layout)
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum
    return removed


def _empty_channels(graph: Any, model: nn.Module) -> Iterator[tuple[nn.Conv2d, list[int]]]:
    """Convolutions, with those of their output channels to remove; each channel once, at the first convolution that makes it."""
    import torch_pruning

    seen: dict[nn.Module, set[int]] = {}
    for conv in model.modules():
        if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
            continue
        channels = sorted(set(range(conv.out_channels)) - seen.get(conv, set()))
        if not channels:
            continue
        group = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, channels)
        largest = dict.fromkeys(channels, 0.0)
        for item in group.items:
            module, is_output = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
            if not isinstance(module, nn.Conv2d | nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups > 1):
                continue
            if is_output:
                seen.setdefault(module, set()).update(item.idxs)
            sizes = module.weight.detach().abs().transpose(0, 0 if is_output else 1).flatten(1).amax(1).tolist()
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                largest[root] = max(largest[root], sizes[index])
        empty = [channel for channel in channels if largest[channel] < THRESHOLD]
        if len(empty) == len(channels):
            empty.remove(max(empty, key=largest.__getitem__))
        if empty:
            yield conv, empty


def _pad_pruner() -> Any:
    import torch_pruning

    class PadPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: PadShortcut, idxs: list[int]) -> PadShortcut:
            layer.inputs, layer.outputs = layer.inputs - sum(i < layer.inputs for i in idxs), layer.outputs - len(idxs)
            return layer

        prune_in_channels = prune_out_channels  # the same function says: what goes in comes out, by the same index

        def get_out_channels(self, layer: PadShortcut) -> int:
            return layer.outputs

        def get_in_channels(self, layer: PadShortcut) -> int:
            return layer.inputs

    return PadPruner()


def _map_padded_channels(graph: Any) -> None:
    """Tell the graph that a padded shortcut's channels of zeros come from nowhere."""
    for node in graph.module2node.values():
        if isinstance(node.module, PadShortcut):
            for dependency in node.dependencies:
                if dependency.target in node.inputs:
                    dependency.index_mapping[0] = _Below(node.module)


class _Below:
    """Of the outputs of a padded shortcut those that are inputs, too."""

    def __init__(self, shortcut: PadShortcut) -> None:
        self.shortcut = shortcut

    def __call__(self, indices: list[Any]) -> list[Any]:
        return [index for index in indices if index.idx < self.shortcut.inputs]


def exchange(optimizer: torch.optim.Optimizer, old: dict[str, nn.Parameter], new: dict[str, nn.Parameter]) -> None:
    """Have ``optimizer`` go on with the parameters ``new`` in the place of those of the same names in ``old``, without state."""
    names = {parameter: name for name, parameter in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [new[names[parameter]] for parameter in group["params"]]
    for parameter in old.values():
        optimizer.state.pop(parameter, None)


def _laid_out(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy with the strides of a fresh tensor: those of one with a single channel say less, and PyTorch chooses kernels by them."""
    return torch.empty_like(tensor, memory_format=layout if tensor.dim() == 4 else torch.contiguous_format).copy_(tensor)


def load(model: nn.Module, state: dict[str, Tensor], layout: torch.memory_format = torch.contiguous_format) -> None:
    """Load the state dict of a pruned network (a run's ``model.pt``) into the network as it was built: its layers become as narrow
    as those in ``state``. Parameters that become smaller are new ones, in the memory format ``layout``.

    Raises:
        RuntimeError: ``state`` is of another network.
    """
    for name, module in model.named_modules():
        weight = state.get(f"{name}.weight")
        if weight is None or not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(weight)
        elif module.groups > 1:
            module.groups = module.in_channels = module.out_channels = len(weight)
        else:
            module.out_channels, module.in_channels = weight.shape[:2]
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, mine in tensors.items():
                theirs = state.get(f"{name}.{key}")
                if mine is not None and theirs is not None and mine.shape != theirs.shape:
                    smaller = _laid_out(mine.detach().new_empty(theirs.shape), layout)
                    setattr(module, key, nn.Parameter(smaller) if kind == "parameter" else smaller)
    for module in model.modules():
        if isinstance(module, BasicBlock):
            module.shortcut.inputs, module.shortcut.outputs = module.conv1.in_channels, module.conv2.out_channels
    model.load_state_dict(state)
