"""What the training steps of an epoch cost, counted while they are made."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning
from localsgd_ext.saved import SavedBytes, saved_activations
from localsgd_ext.train.measure import MultiplyAdds, multiply_adds
from localsgd_ext.train.stochastic_depth import ResidualBranches


@dataclass(frozen=True)
class DroppedBranches:
    """What a step costs where residual branches are left out."""

    branches: ResidualBranches
    whole: tuple[SavedBytes, MultiplyAdds]
    """Of the network with every branch, see :func:`whole_cost`."""


def whole_cost(model: nn.Module, x: Tensor) -> tuple[SavedBytes, MultiplyAdds]:
    """What a step of the whole network costs on ``x``, measured on a copy. Call it under the run's autocast."""
    model = copy.deepcopy(model).train()
    with saved_activations(model) as saved, multiply_adds(model) as counted:
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64, device=x.device))
    return saved, counted


class Cost:
    """What an epoch's steps cost: the first of each kind (a refresh or none) is counted, and stands for the others.

    With stochastic depth every step is of another kind: the whole network was counted beforehand, and a step costs that less the
    branches that it left out. The memory is the whole network's, as any step may need it.
    """

    def __init__(
        self, model: nn.Module, local: LocalizedLearning | None, sample: float, dropped: DroppedBranches | None = None
    ) -> None:
        self.saved_bytes = 0
        """Saved for the backward pass, of the kind of step that saves most."""
        self.multiply_adds = 0.0
        """Of all steps together."""
        self._model, self._local, self._sample, self._dropped = model, local, sample, dropped
        self._each: dict[bool, float] = {}

    @contextlib.contextmanager
    def of_step(self, refreshing: bool) -> Iterator[None]:
        if self._dropped is not None:
            self._dropped.branches.dropped.clear()
            yield
            saved, counted = self._dropped.whole
            left_out, block_of = self._dropped.branches.dropped, self._dropped.branches.block_of
            self.saved_bytes = saved.total
            self.multiply_adds += sum(n for layer, n in counted.by_layer.items() if block_of(layer) not in left_out)
            return
        if refreshing not in self._each:
            local = self._local
            learning = local.local_layers if local and local.rule == "hebbian" and not refreshing else ()
            with saved_activations(self._model) as saved, multiply_adds(self._model, learning, self._sample) as counted:
                yield
            self.saved_bytes = max(self.saved_bytes, saved.total)
            self._each[refreshing] = counted.total
        else:
            yield
        self.multiply_adds += self._each[refreshing]
