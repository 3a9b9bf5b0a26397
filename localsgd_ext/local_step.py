"""The normalised step that a layer's weight makes along ``D`` (paper, equation 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .checks import require_numbers
from .layer_hook import LayerHook
from .replicated_sums import Summed


class LocalStep:
    """Makes ``W += lr * D / ||D||_2`` where ``D`` is at hand, and counts what is skipped (``||D||_2`` zero or not finite).

    Args:
        lr: signed learning rate, kept on each device too, where captured graphs read it.
        normalize: ``False`` leaves out the division.
        momentum: ``V = momentum * V + D / ||D||_2``, ``W += lr * V``.
    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, lr: float, *, normalize: bool, momentum: float) -> None:
        self.lr = check_lr(lr)
        self.normalize = normalize
        self.momentum = check_momentum(momentum)
        self._lr_tensors: dict[torch.device, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, on the devices too.

        Raises:
            ValueError: ``lr`` is not finite.
        """
        self.lr = check_lr(lr)
        for tensor in self._lr_tensors.values():
            tensor.fill_(self.lr)

    def lr_on(self, device: torch.device) -> Tensor:
        tensor = self._lr_tensors.get(device)
        if tensor is None:
            tensor = self._lr_tensors[device] = torch.full((), self.lr, dtype=torch.float64, device=device)
        return tensor

    def write(self, hook: LayerHook, correlation: Tensor, ran: Tensor | None = None) -> None:
        """One layer's step. Where ``ran``, a boolean of one element, is false it is not counted as skipped."""
        weight = hook.module.weight
        lr = self.lr_on(weight.device)
        if not self.momentum:
            ops.apply_update_([weight], [correlation], lr, normalize=self.normalize, skipped=hook.counter())
            return
        with torch.no_grad():
            norm = torch.linalg.vector_norm(correlation, dtype=torch.float64)
            usable = torch.isfinite(norm) & (norm > 0)
            step = correlation / norm.to(correlation.dtype) if self.normalize else correlation
            velocity = self._velocity.setdefault(hook.name, torch.zeros_like(correlation))
            velocity.copy_(torch.where(usable, self.momentum * velocity + step, velocity))
            moved = (weight.to(velocity.dtype) + lr.to(velocity.dtype) * velocity).to(weight.dtype)
            weight.copy_(torch.where(usable, moved, weight))
            hook.counter().add_(~usable if ran is None else ~usable & ran)

    def write_summed(self, summed: Sequence[Summed]) -> None:
        """The steps of many layers, with one launch on each device; what never ran is not counted as skipped."""
        if self.momentum:
            for each in summed:
                self.write(each.hook, each.correlation, each.runs > 0)
            return
        by_device: dict[torch.device, list[Summed]] = {}
        for each in summed:
            by_device.setdefault(each.correlation.device, []).append(each)
        with torch.no_grad():
            for device, several in by_device.items():
                weights, correlations = [each.hook.module.weight for each in several], [each.correlation for each in several]
                skipped = torch.zeros(len(several), dtype=torch.int64, device=device)
                ops.apply_update_(weights, correlations, self.lr_on(device), normalize=self.normalize, skipped=skipped)
                skipped.mul_(torch.stack([each.runs for each in several]) > 0)
                torch._foreach_add_([each.hook.counter(device) for each in several], list(skipped.unbind()))

    def forget(self, name: str) -> None:
        """Begin without momentum where this layer learns locally again."""
        self._velocity.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """The learning rate, and momentum by the name of the layer."""
        return {"lr": self.lr, "momentum": {name: velocity.detach().clone() for name, velocity in self._velocity.items()}}

    def load_state_dict(self, state: dict[str, Any], devices: dict[str, torch.device]) -> None:
        """Restore :meth:`state_dict`, with each layer's momentum on its device in ``devices``."""
        self.set_lr(state["lr"])
        self._velocity = {name: saved.to(device=devices[name], copy=True) for name, saved in state["momentum"].items()}


def check_momentum(momentum: object) -> float:
    """``momentum`` as a float.

    Raises:
        ValueError: it is not in [0, 1).
        TypeError: it is no number.
    """
    require_numbers(momentum=momentum)
    value = float(momentum)  # type: ignore[arg-type]
    if not 0 <= value < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    return value


def check_lr(lr: object) -> float:
    """``lr`` as a float.

    Raises:
        ValueError: it is not finite, and would overwrite every local weight.
        TypeError: it is no number.
    """
    require_numbers(lr=lr)
    value = float(lr)  # type: ignore[arg-type]
    if not math.isfinite(value):
        raise ValueError(f"lr must be finite, got {lr}")
    return value
