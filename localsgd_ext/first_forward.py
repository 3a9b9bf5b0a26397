"""The first training forward, in which the order of the layers is found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .hooks import CallHook, Hook, under_transform
from .layers import ExecutionPlan, Patterns, Tracer, trace_as_it_is, trace_layers
from .updater import NO_TRANSFORM
from .wrappers import refuse_sharded

if TYPE_CHECKING:
    from .distributed import ReplicatedModel


class FirstForward:
    """Watches for the first training forward of ``model`` and hands over the order in which its layers run.

    Args:
        replicas: what ``model`` is in, if it is: before its first training forward there is one more.
        adopt: called with the plan after that forward, unless it raised. The hooks are still on then: see :meth:`ignore`.
        include, skip: which modules may be layers.
    """

    def __init__(
        self,
        model: nn.Module,
        replicas: ReplicatedModel | None,
        adopt: Callable[[ExecutionPlan], None],
        *,
        include: Patterns = None,
        skip: Patterns = None,
    ) -> None:
        self._model, self._replicas, self._adopt = model, replicas, adopt
        self._include, self._skip = include, skip
        self._stop: Callable[[], None] | None = None  # ends the tracing that goes on
        self._tracer: Tracer | None = None
        self._handles: list[Any] = []

    def watch(self) -> None:
        """From now on, until :meth:`ignore`: once the order is known, torch.compile need not look at the hooks."""
        if self._replicas is not None:
            self._replicas.before_training = torch.compiler.disable(self._before_training)  # type: ignore[no-untyped-call]
        self._handles = [
            self._model.register_forward_pre_hook(CallHook(self._before), prepend=True),
            self._model.register_forward_hook(_AfterForward(self._after), always_call=True),
        ]

    def ignore(self) -> None:
        """Take the hooks off."""
        if self._replicas is not None:
            self._replicas.before_training = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExecutionPlan:
        """Find the order by a training forward of its own, which changes nothing."""
        with self._unwatched():
            return trace_layers(self._model, *args, include=self._include, skip=self._skip, **kwargs)

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """A context whose forward our own hooks leave to ``trace_layers``."""
        refuse_sharded(self._model)
        self._stop = lambda: None
        try:
            yield
        finally:
            self.abandon()

    def abandon(self) -> Tracer | None:
        """End the tracing that goes on, if one does."""
        tracer, self._tracer = self._tracer, None
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()
        return tracer

    def _before_training(self, *args: Any, **kwargs: Any) -> None:
        # The forward that follows must find its arguments as they are, whatever this one writes into them.
        args, kwargs = tree_map_only(Tensor, lambda t: t.clone(), (args, kwargs))
        with self._unwatched():  # in the modes that this forward has: BatchNorm in evaluation mode takes a single sample
            plan = trace_as_it_is(self._model, args, kwargs, include=self._include, skip=self._skip)
        self._adopt(plan)

    def _before(self, module: nn.Module) -> None:
        if self._handles and self._stop is None and module.training and torch.is_grad_enabled():
            refuse_sharded(module)
            if under_transform() or not all(isinstance(p, nn.Parameter) for p in self._model.parameters()):
                raise RuntimeError(f"the first training forward finds the order of the layers, {NO_TRANSFORM}")
            self._tracer = Tracer(self._model, include=self._include, skip=self._skip)
            self._stop = self._tracer.start()

    def _after(self, failed: bool, output: Any) -> None:
        tracer = self.abandon()
        if tracer is not None and not failed:
            self._adopt(tracer.plan(output))


class _AfterForward(Hook):
    """Calls ``action(failed, output)`` after a forward, even one that raised (``always_call``: torch then passes no output)."""

    def __init__(self, action: Callable[[bool, Any], None]) -> None:
        self.action = action

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.action(output is None and sys.exc_info()[0] is not None, output)
