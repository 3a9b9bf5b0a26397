"""A training step as people run it, whatever it trains: under autocast, compiled, as a CUDA graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_variants import Variant
from localsgd_ext.graphs import CudaRecorder, GraphedStep, Recorder

DTYPES = {"bf16": torch.bfloat16, "tf32": None, "fp32": None}
WARM_UPS = 3  # steps before one is captured


def recorder(device: str) -> Recorder:
    """What captures steps; none on a CPU, but that of tests."""
    if device != "cuda":
        raise ValueError("dresses with a graph need --device cuda")
    return CudaRecorder()


@dataclass(frozen=True)
class Dress:
    """How a step is run, whatever it trains."""

    device: str
    dtype: str
    compiled: bool = False
    graph: bool = False
    backend: str = "inductor"

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.dtype]
        # A graph must hold the casts of weights that a cache would spare it.
        return torch.autocast(self.device, dtype, enabled=dtype is not None, cache_enabled=not self.graph)

    def step(self, variant: Variant, x: Tensor, y: Tensor) -> Callable[[], object]:
        """One training step of ``variant`` on always the same mini-batch."""
        forward = self._compiled(variant.model) if self.compiled else variant.model

        def step(x: Tensor, y: Tensor) -> Tensor:
            variant.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = F.cross_entropy(forward(x), y)
            loss.backward()
            variant.optimizer.step()
            return loss

        if not self.graph:
            return lambda: step(x, y)
        if variant.learning is not None:
            graphed = GraphedStep(variant.learning, step, warmup=WARM_UPS, recorder=recorder(self.device))
            return lambda: graphed(x, y)
        return _captured(step, recorder(self.device), x, y)

    def _compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """What is compiled belongs to a code object, and neither hooks nor, before PyTorch 2.13, what is frozen tells models of one class
        apart: each gets a code object of its own."""

        def forward(x: Tensor) -> Tensor:
            return model(x)  # type: ignore[no-any-return]

        own = types.FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
        return torch.compile(own, backend=self.backend)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _captured(step: Callable[..., Tensor], by: Recorder, *inputs: Tensor) -> Callable[[], object]:
    """As :class:`GraphedStep` has it, copies included, of a step without a boundary."""
    static = [x.clone() for x in inputs]
    for _ in range(WARM_UPS):
        by.warm_up(lambda: step(*static))
    replay = by.capture(lambda: step(*static))

    def call() -> object:
        for to, x in zip(static, inputs, strict=True):
            to.copy_(x, non_blocking=True)
        return replay().detach().clone()

    return call
