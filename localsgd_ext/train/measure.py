"""Time by phase of a training step, and the activations it keeps for the backward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PHASES = ("data", "forward", "backward", "optimizer")


class PhaseTimer:
    """Times the phases of every step; on a GPU with events, so that nothing waits until :meth:`medians`.

    ::

        timer.start()
        for x, y in batches:
            timer.mark("data")
            ...
            timer.mark("optimizer")
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {phase: [] for phase in PHASES}
        self._last_time = 0.0
        self._last_event: torch.cuda.Event | None = None

    def start(self) -> None:
        """The first phase begins now."""
        if self._cuda:
            self._last_event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last_event.record()
        self._last_time = time.perf_counter()

    def mark(self, phase: str) -> None:
        """``phase`` ends now and the next one begins."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            assert self._last_event is not None
            self._events[phase].append((self._last_event, event))
            self._last_event = event
        else:
            now = time.perf_counter()
            self._times[phase].append(now - self._last_time)
            self._last_time = now

    def medians(self) -> dict[str, float]:
        """Median of each phase over the steps in milliseconds. The first step, which warms things up, is left out."""
        if self._cuda:
            torch.cuda.synchronize()
            times = {phase: [a.elapsed_time(b) for a, b in pairs] for phase, pairs in self._events.items()}
        else:
            times = {phase: [1e3 * t for t in values] for phase, values in self._times.items()}
        return {phase: statistics.median(values[1:] or values or [0.0]) for phase, values in times.items()}


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
