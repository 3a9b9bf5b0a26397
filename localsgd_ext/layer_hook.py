"""The forward hook of one layer that learns locally, and what is known of the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .hooks import Hook
from .reference import gram_sums_size

if TYPE_CHECKING:
    from .updater import HebbianUpdater


@dataclass(frozen=True)
class Pick:
    """What all processes do for a layer."""

    algorithm: str = ""
    """Empty: each the updater's."""
    seen: str = ""
    """Where Gram sums are reduced in the place of ``D``: the dtype that the forward multiplied in, as a string for checkpoints."""

    @property
    def gram(self) -> torch.dtype | None:
        """That dtype; None: ``D`` is reduced."""
        return getattr(torch, self.seen) if self.seen else None


class LayerHook(Hook):
    """The forward hook of one layer."""

    def __init__(self, updater: HebbianUpdater, name: str, module: nn.Module) -> None:
        self.updater = updater
        self.update = updater._eager(updater._update)
        self.name = name
        self.module: Any = module
        self.is_linear = isinstance(module, nn.Linear)
        self.enabled = False
        self.deferred = False
        self.fired = False
        self.pick = Pick()
        self.gram: torch.dtype | None = None
        """Where its Gram sums are reduced in the place of ``D``: the dtype of the forward's product."""
        self.last_forward = -1
        self.skipped: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.enabled and not self.updater.paused and module.training and torch.is_grad_enabled():
            self.update(self, args[0] if args else kwargs["input"], output)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that describe the layer's geometry to the operations."""
        m = self.module
        bias, algorithm = parameter(m, "bias"), self.pick.algorithm or self.updater.algorithm
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

    def summand(self, x: Tensor, z: Tensor, gram: torch.dtype | None) -> Tensor:
        """What is added up over processes: ``D``, or the sums it is made of where ``gram`` is not None."""
        arguments = self.arguments()
        if gram is None:
            return ops.correlation(x, z, self.module.weight, **arguments)
        del arguments["z_is_output"], arguments["algorithm"]
        return ops.gram_sums(x, self.module.weight, **arguments)

    def see(self, x: Tensor, z: Tensor) -> None:
        """Pick what all processes are to do with operands like these."""
        arguments, weight = self.arguments(), self.module.weight
        if ops.obstacle(weight, x, z):
            return
        algorithm = self.updater.algorithm
        if algorithm == "auto":
            del arguments["algorithm"]
            algorithm = ops.plan(x, z, weight, **arguments).pick
        bias = self.module.bias
        # The product W·G is made later, so that W and b must not change until then; and on a GPU G does not leave the kernel.
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        reduced = algorithm == "gram" and weight.is_cpu and frozen and self.gram_size() < weight.numel()
        self.pick = Pick("" if algorithm == self.updater.algorithm else algorithm, str(z.dtype)[6:] if reduced else "")

    def versions(self) -> tuple[int, ...]:
        """Of what Gram sums are multiplied by later: others once somebody has written into it."""
        return tuple(p._version for p in (self.module.weight, self.module.bias) if p is not None)

    def gram_size(self) -> int:
        return gram_sums_size(self.module.weight, self.module.bias, 1 if self.is_linear else self.module.groups)

    def correlation_of(self, total: Tensor) -> Tensor:
        """``D`` of what was reduced."""
        if self.gram is None:
            return total
        dtype = self.gram
        weight, bias = (
            p if p is None or p.dtype.itemsize <= dtype.itemsize else p.to(dtype)
            for p in (self.module.weight, self.module.bias)
        )
        return ops.correlation_of_gram_sums(total, weight, bias=bias, groups=1 if self.is_linear else self.module.groups)

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
