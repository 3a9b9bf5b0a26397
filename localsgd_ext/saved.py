"""The activations that a training step keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class SavedBytes:
    """Bytes that autograd keeps for the backward pass."""

    total: int = 0


@contextmanager
def saved_activations(model: nn.Module) -> Iterator[SavedBytes]:
    """Count what a forward pass saves for its backward pass: every storage once, the model's own tensors not at all.

    Nothing is freed before the backward pass begins, so the sum at the end of the forward pass is the peak.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # holds the tensors: a freed storage's address could come back
    saved = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor.detach()
            saved.total += storage.nbytes()
        return tensor.detach()  # a layer's own output would hold the layer's node, and so the graph itself, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
