"""What tells without a backward pass whether a prefix should learn: the losses of mini-batches, and how far outputs have moved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WINDOW = 32  # mini-batches


class LossGate:
    """Open for the ``1 / every`` of the mini-batches that have the highest losses, as far as the last ones tell."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def opens(self, loss: float) -> bool:
        self._losses.append(loss)
        return sorted(self._losses, reverse=True).index(loss) < math.ceil(len(self._losses) / self._every)


class Drift:
    """How many of the first ``layers`` of ``model`` put out from epoch to epoch what they put out before, for the pictures ``x``."""

    def __init__(self, model: nn.Module, layers: Sequence[str], x: Tensor, share: float) -> None:
        modules = dict(model.named_modules())
        self._model, self._layers, self._x, self._share = model, [modules[name] for name in layers], x, share
        self._before: list[Tensor] = []
        self._still = 0

    @torch.no_grad()
    def end_epoch(self) -> int:
        """The longest prefix of layers each of whose outputs has changed by less than ``share`` of its norm; once still, always still.

        Runs the model once in evaluation mode.
        """
        now: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda _, args, output: now.append(output)) for layer in self._layers]
        training = self._model.training
        self._model.eval()
        try:
            self._model(self._x)
        finally:
            self._model.train(training)
            for handle in handles:
                handle.remove()
        changes = [float((a - b).norm() / b.norm()) for a, b in zip(now, self._before, strict=False)]
        still = next((i for i, change in enumerate(changes) if not change < self._share), len(changes))
        self._before, self._still = now, max(self._still, still)
        return self._still
