"""The memory that a training step takes, by which the batch may grow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .learning import LocalizedLearning
from .saved import saved_activations

if TYPE_CHECKING:
    from .batch_growth import ResizableBatchSampler


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step of ``batch_size`` samples takes."""

    constant: float
    """Whatever the batch: parameters, gradients, the optimizer's state."""
    activations: float
    """Grows with the batch."""
    batch_size: int

    def at(self, batch_size: int) -> float:
        """``constant + activations * batch_size / self.batch_size``: what a step of ``batch_size`` samples would take."""
        return self.constant + self.activations * batch_size / self.batch_size


Measure = Callable[[bool], StepMemory | None]
"""``measure(whole)``: a step at the present boundary, after it has moved; ``whole``: one that back-propagates through the whole
network (boundary 0, or a refresh), else one that stops at the boundary. ``None``: not known yet."""


class SavedMemory:
    """What a step takes on a CPU: bytes saved for the backward pass, which ``saved_activations`` counts in a training forward.

    The forward is one of ``inputs`` through a copy of the network, for each kind of step at the present boundary: it changes
    nothing, and takes the copy's memory for its time. Constant are parameters, buffers, gradients of what learns, and the
    optimizers' state. What neither is (workspaces, the loss, gradients of activations, and activations that checkpointing computes anew in the
    backward pass) is not counted: leave room for it.
    Where you train under autocast, call :meth:`BatchGrowth.step` under it.

    Args:
        inputs: what the network is called with. The first tensor's first dimension is the number of samples: a few will do.
    Raises:
        ValueError: no input is a tensor of at least one sample.
    """

    def __init__(self, local: LocalizedLearning, *inputs: Any) -> None:
        sizes = [len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0]
        if not sizes or sizes[0] < 1:
            raise ValueError(f"inputs must have a tensor of at least one sample, got {_described(inputs)}")
        self._local, self._inputs, self._batch_size = local, inputs, sizes[0]

    def __call__(self, whole: bool) -> StepMemory:
        model = copy.deepcopy(self._local.model).train()  # its hooks are dead: no local updates, no counting
        frozen = set(self._local._freeze.frozen) if self._local._freeze is not None else set()
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(whole)
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(devices)), torch.enable_grad(), saved_activations(model) as saved:
            model(*self._inputs)
        learning = [p for p in model.parameters() if p.requires_grad]
        states = (s for each in self._local._optimizers for s in each.state.values())
        state = [value for s in states for value in s.values() if isinstance(value, Tensor)]
        constant = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *learning, *state))
        return StepMemory(constant, saved.total, self._batch_size)


class PeakMemory:
    """What a step takes on a CUDA device: the peak of ``torch.cuda.max_memory_allocated`` over the steps that were made.

    The peak is read, and reset, after every step of an optimizer. Constant is what is allocated when it is asked for, between two
    epochs. A step that stops at a boundary takes no more than one that stopped at an earlier one: that is what is answered before
    the first step at a new boundary. What comes between two steps, such as an evaluation, counts with the second. The peaks are in
    the state of :class:`BatchGrowth`, so that a resumed run decides alike. Memory that the allocator reserves beyond what is
    allocated, and workspaces of layers that have only now become local, are not in it: leave room for them.

    Raises:
        ValueError: the network is not on a CUDA device.
    """

    def __init__(self, local: LocalizedLearning, batch_sampler: ResizableBatchSampler) -> None:
        device = device_of(local)
        if device.type != "cuda":
            raise ValueError(f"local must be of a network on a CUDA device, got one on {device}")
        self._local, self._batch_sampler, self._device = local, batch_sampler, device
        self._peaks: dict[bool, tuple[int, int, int]] = {}  # whole -> boundary, batch size, bytes
        self._whole = True
        self.highest = 0
        """Bytes: the highest of these peaks since it was last set to 0."""
        self._handles = [
            handle
            for optimizer in local._optimizers
            for handle in (optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after))
        ]

    def __call__(self, whole: bool) -> StepMemory | None:
        found = self._peaks.get(whole)
        if not whole and (found is None or found[0] > self._local.boundary):
            found = self._peaks.get(True)
        if found is None:
            return None
        _, batch_size, peak = found
        constant = torch.cuda.memory_allocated(self._device)
        return StepMemory(constant, max(0, peak - constant), batch_size)

    def state_dict(self) -> dict[bool, tuple[int, int, int]]:
        """Boundary, batch and bytes of the highest step that back-propagated through the whole network, and of the highest other."""
        return dict(self._peaks)

    def load_state_dict(self, state: dict[bool, tuple[int, int, int]]) -> None:
        """Restore :meth:`state_dict`."""
        self._peaks = dict(state)

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._whole = self._local.boundary == 0 or self._local.refreshing  # after the step it is of the next mini-batch

    def _after(self, *_: Any) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.highest = max(self.highest, peak)
        where = 0 if self._whole else self._local.boundary, self._batch_sampler.batch_size
        before = self._peaks.get(self._whole)
        self._peaks[self._whole] = *where, max(peak, before[2]) if before is not None and before[:2] == where else peak


def device_of(local: LocalizedLearning) -> torch.device:
    """Where the network is."""
    return next(local.model.parameters()).device


def _described(inputs: tuple[Any, ...]) -> str:
    return ", ".join(f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in inputs) or "nothing"
