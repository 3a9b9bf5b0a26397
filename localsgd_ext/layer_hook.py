"""The forward hook of one layer that learns locally, and what the operations are told of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .hooks import Hook

if TYPE_CHECKING:
    from .updater import HebbianUpdater


class LayerHook(Hook):
    """The forward hook of one layer.

    Args:
        updater: whose hook it is.
        update: called as ``update(hook, x, z)`` in every training forward of the layer while it is enabled.
    """

    def __init__(self, updater: HebbianUpdater, update: Callable[..., None], name: str, module: nn.Module) -> None:
        self.updater = updater
        self.update = update
        self.name = name
        self.module: Any = module
        self.is_linear = isinstance(module, nn.Linear)
        self.enabled = False
        self.deferred = False
        self.fired = False
        self.algorithm = ""
        """What computes its ``D``. Empty: the updater's."""
        self.last_forward = -1
        self.skipped: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.enabled and not self.updater.paused and module.training and torch.is_grad_enabled():
            self.update(self, args[0] if args else kwargs["input"], output)

    @property
    def groups(self) -> int:
        return 1 if self.is_linear else int(self.module.groups)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that describe the layer's geometry to the operations."""
        m = self.module
        bias, algorithm = parameter(m, "bias"), self.algorithm or self.updater.algorithm
        # A user's activation makes z something other than the layer's output: the Gram form would ignore it.
        z_is_output = self.updater.activation is None
        if self.is_linear:
            return {"bias": bias, "z_is_output": z_is_output, "algorithm": algorithm}
        return {
            "bias": bias,
            "stride": m.stride,
            "padding": m.padding,
            "dilation": m.dilation,
            "groups": m.groups,
            "padding_mode": m.padding_mode,
            "z_is_output": z_is_output,
            "algorithm": algorithm,
        }

    def counter(self, device: torch.device | None = None) -> Tensor:
        device = self.module.weight.device if device is None else device
        if self.skipped is None:
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif self.skipped.device != device:  # the model was moved
            self.skipped = self.skipped.to(device)
        return self.skipped


def parameter(module: Any, name: str) -> Any:
    """``getattr`` without the detour that ``nn.Module`` makes, which takes longer than everything else in a hook."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
