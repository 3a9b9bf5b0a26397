"""Time by phase of a training step, and its multiply-adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from localsgd_ext.layers import LAYER_TYPES

PHASES = ("data", "forward", "backward", "optimizer")


class PhaseTimer:
    """Times the phases of every step; on a GPU with events, so that nothing waits until :meth:`medians`.

    ::

        timer.start()
        for x, y in batches:
            timer.mark("data")
            ...
            timer.mark("optimizer")

    Steps of several kinds, some of which take longer on purpose, are told apart by :meth:`kind`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {phase: [] for phase in PHASES}
        self._kinds: list[bool] = []
        self._last_time = 0.0
        self._last_event: torch.cuda.Event | None = None

    def start(self) -> None:
        """The first phase begins now."""
        if self._cuda:
            self._last_event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._last_event.record()
        self._last_time = time.perf_counter()

    def kind(self, kind: bool) -> None:
        """What the step that begins is; steps of which nothing is said are of one kind."""
        self._kinds.append(kind)

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
        """Median of each phase over the steps in milliseconds; of kinds, the mean of their medians by their numbers.

        The first step, which warms things up, is left out.
        """
        if self._cuda:
            torch.cuda.synchronize()
            times = {phase: [a.elapsed_time(b) for a, b in pairs] for phase, pairs in self._events.items()}
        else:
            times = {phase: [1e3 * t for t in values] for phase, values in self._times.items()}
        return {phase: self._median(values) for phase, values in times.items()}

    def _median(self, values: list[float]) -> float:
        by_kind: dict[bool, list[float]] = {}
        for kind, value in zip(self._kinds or [False] * len(values), values, strict=True):
            by_kind.setdefault(kind, []).append(value)
        if not by_kind:
            return 0.0
        first = (self._kinds or [False])[0]
        medians = {kind: statistics.median(some[kind == first :] or some) for kind, some in by_kind.items()}
        return sum(medians[kind] * len(some) for kind, some in by_kind.items()) / len(values)


@dataclass
class MultiplyAdds:
    """Of the convolutions and linear layers in a training step, forward and backward."""

    by_layer: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.by_layer.values())


@contextmanager
def multiply_adds(model: nn.Module, local: Collection[str] = (), sample: float = 1.0) -> Iterator[MultiplyAdds]:
    """Count what a forward and the backward pass of its graph multiply: a product a layer each for its output, for the gradient
    of its weight if that requires one, and for that of its input if that does.

    ``local`` names layers that are updated in this forward: one product more, of the fraction ``sample`` of the batch, whatever
    shortcut the kernels take.
    """
    counted = MultiplyAdds()

    def count(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor, share: float) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        products = 1 + weight.requires_grad + args[0].requires_grad + share
        counted.by_layer[name] = counted.by_layer.get(name, 0) + output.numel() * weight[0].numel() * products

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            share = sample if name in local else 0.0
            handles.append(module.register_forward_hook(lambda m, a, z, n=name, share=share: count(n, m, a, z, share)))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
