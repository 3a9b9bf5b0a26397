"""BatchNorm in evaluation mode as a part of the layer before it: one pass over the activations less."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .fold_pairs import is_watched
from .hooks import OwnForward, unchanged, under_transform


class Fold:
    """A frozen layer and the BatchNorm behind it, which alone reads its output, as one layer with other weights.

    ``BN(conv(x, W) + b) = conv(x, s W) + s (b - mean) + shift`` with ``s = scale / sqrt(var + eps)``. While it is installed, the layer's
    forward computes that from tensors kept here and the BatchNorm's hands its input through. Modules, parameters and buffers stay
    as they are. Both do what their classes do in evaluation mode, where something thaws one of the parameters, under a hook that
    would see the layer's output, in ``torch.func`` transforms and in graphs of ``torch.compile``, which puts a BatchNorm in
    evaluation mode into what follows it by itself and could not see that a fold is out of date.

    What has changed is folded anew in the next forward: other tensors, or a write that raises their version. A write through
    ``.data`` does not, and is seen at the next :meth:`install`.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        self.layer: Any = layer
        self.norm: Any = norm
        self.replaced = 0
        """How often other tensors took the place of the folded ones, which otherwise are written in place."""
        self.handed = False  # the layer's last output is to be handed through
        self.output: Callable[[], Tensor | None] = lambda: None
        self._forwards = (_LayerForward(self, layer), _NormForward(self, norm))
        self._sources: tuple[Any, ...] = ()
        self._stamps: tuple[Any, ...] = ()
        self._memory: list[Tensor] = []  # kept, so that no other tensor gets the same address
        self._folded: tuple[Tensor, Tensor] | None = None

    def install(self) -> None:
        """Begin to compute with folded weights, and fold them anew; not where either module has got another forward."""
        self._sources = ()
        if all(unchanged(each.module, type(each.module), "forward") for each in self._forwards):
            for each in self._forwards:
                each.install()

    def take_off(self) -> None:
        """Leave the modules as their classes made them."""
        for each in self._forwards:
            each.take_off()

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """Folded weight and bias, up to date; ``None`` where gradients of what they are made of are wanted."""
        layer, norm = self.layer, self.norm
        parameters = layer.weight, layer.bias, norm.weight, norm.bias
        sources = (*parameters, norm.running_mean, norm.running_var)
        if any(p is not None and p.requires_grad for p in parameters) or sources[4] is None or sources[5] is None:
            return None
        stamps = (norm.eps, *(None if t is None else (t._version, t.data_ptr(), t.stride()) for t in sources))
        same = len(self._sources) == len(sources) and all(a is b for a, b in zip(self._sources, sources, strict=True))
        if self._folded is None or not same or stamps != self._stamps:
            self._fold(*sources)
            self._sources, self._stamps = sources, stamps
            self._memory = [t.detach() for t in sources if t is not None]
        return self._folded

    def _fold(self, weight: Tensor, bias: Any, scale: Any, shift: Any, mean: Tensor, var: Tensor) -> None:
        # Not as inference tensors: those could not be saved for the backward pass of another forward.
        with torch.inference_mode(False), torch.no_grad():
            w, b, s, t, m, v = (None if x is None else x.double() for x in (weight, bias, scale, shift, mean, var))
            assert w is not None
            assert m is not None
            assert v is not None
            if isinstance(self.layer, nn.Linear):
                s, t = torch.ones_like(m) if s is None else s, torch.zeros_like(m) if t is None else t
                made = fuse_linear_bn_weights(w, b, m, v, self.norm.eps, s, t)
            else:
                made = fuse_conv_bn_weights(w, b, m, v, self.norm.eps, s, t)
            folded = torch.empty_like(weight), torch.empty_like(mean if bias is None else bias, dtype=weight.dtype)
            if self._folded is None or any(_layout(a) != _layout(b) for a, b in zip(self._folded, folded, strict=True)):
                self._folded = folded
                self.replaced += 1
            for mine, new in zip(self._folded, made, strict=True):
                mine.copy_(new)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class _LayerForward(OwnForward):
    def __init__(self, fold: Fold, module: nn.Module) -> None:
        super().__init__(module)
        self.fold = fold

    def __call__(self, input: Tensor) -> Tensor:
        fold, layer = self.fold, self.module
        fold.handed = False
        if not torch.compiler.is_compiling() and layer.training and input.dim() == layer.weight.dim():
            folded = None if under_transform() or is_watched(layer, fold.norm) else fold.tensors()
            if folded is not None:
                z: Tensor = F.linear(input, *folded) if isinstance(layer, nn.Linear) else layer._conv_forward(input, *folded)
                fold.handed, fold.output = True, weakref.ref(z)
                return z
        return type(layer).forward(layer, input)  # type: ignore[no-any-return]


class _NormForward(OwnForward):
    def __init__(self, fold: Fold, module: nn.Module) -> None:
        super().__init__(module)
        self.fold = fold

    def __call__(self, input: Tensor) -> Tensor:
        fold = self.fold
        handed, fold.handed = fold.handed, False
        # A graph that begins between the two cannot ask which tensor it was, but guards on whether there was one.
        if handed and (torch.compiler.is_compiling() or fold.output() is input):
            return input
        return type(self.module).forward(self.module, input)  # type: ignore[no-any-return]
