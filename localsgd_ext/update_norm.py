"""How far a layer's weight moves in an epoch."""

from __future__ import annotations

import torch
from torch import Tensor


class UpdateNorm:
    """``||W_T(end of an epoch) - W_T(its start)||_2``, which :class:`~localsgd_ext.DynamicModeSelection` goes by."""

    def __init__(self) -> None:
        self._start: Tensor | None = None

    def begin(self, weight: Tensor) -> None:
        """An epoch begins, with this weight in the transition layer."""
        self._start = weight.detach().clone()

    def norm(self, weight: Tensor) -> float:
        """Of what ``weight`` has become."""
        assert self._start is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        change = weight.detach().to(dtype) - self._start.to(weight.device, dtype)
        return float(torch.linalg.vector_norm(change, dtype=torch.float64))

    def forget(self) -> None:
        self._start = None

    def state(self) -> Tensor | None:
        """A copy of the weight at the start of the epoch, if one began."""
        return None if self._start is None else self._start.clone()

    def load(self, state: Tensor | None, device: torch.device) -> None:
        self._start = None if state is None else state.to(device, copy=True)
