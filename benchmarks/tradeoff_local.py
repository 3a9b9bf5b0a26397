"""A prefix that makes local steps between the mini-batches it learns from, and what keeps these steps from doing harm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.study_rules import LocalLayers, Variant
from localsgd_ext.supervision import WeakSupervision

SUPERVISIONS = ("", "sign", "revert")


class LocalPrefix:
    """Steps of length ``lr`` by ``rule`` on convolutions, in the forward pass.

    Args:
        layers: the names of all that may become local, in their order.
        supervision: ``"sign"``: the sign is Algorithm 2's; ``"revert"``: after an epoch whose loss rose, the layers that were local in it
            get back the weights they had when it began, and stay as they are for an epoch.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], rule: str, lr: float, supervision: str = "") -> None:
        if supervision not in SUPERVISIONS:
            raise ValueError(f"supervision must be one of {SUPERVISIONS}, got {supervision!r}")
        modules = dict(model.named_modules())
        self._layers = [name for name in layers if isinstance(modules[name], nn.Conv2d)]
        self._weights = {name: model.get_parameter(f"{name}.weight") for name in self._layers}
        self._steps = LocalLayers(model, self._layers, {}, Variant(rule=rule))
        self._lr = lr
        self._supervision, self._sign = supervision, WeakSupervision()
        self._rests, self._last_loss = False, float("inf")
        self._local: list[str] = []
        self._good: dict[str, Tensor] = {}

    def begin_epoch(self, prefix: Sequence[str]) -> None:
        self._local = [] if self._rests else [name for name in self._layers if name in prefix]
        self._steps.lr = self._lr * (self._sign.sign if self._supervision == "sign" else 1)
        self._good = {name: self._weights[name].detach().clone() for name in self._local}

    def begin_step(self, local: bool) -> list[str]:
        """Whether the step is local; returns the layers that it will change so."""
        active = self._local if local else []
        self._steps.active = frozenset(active)
        return active

    def end_epoch(self, loss: float) -> None:
        """``loss``: the epoch's mean."""
        self._steps.active = frozenset()
        if self._supervision == "sign":
            self._sign.step(loss)
        rose, self._last_loss = not loss <= self._last_loss, loss
        self._rests = self._supervision == "revert" and rose and bool(self._local)
        if self._rests:
            with torch.no_grad():
                for name, weight in self._good.items():
                    self._weights[name].copy_(weight)
