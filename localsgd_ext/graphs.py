"""The whole training step as a CUDA graph, captured again where the boundary moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .learning import LocalizedLearning

Step = Callable[..., Any]
_DROPS = 20


class Recorder(Protocol):
    """How steps are run before they are captured, and captured."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run the step as it is, where what a capture needs is set up by it."""

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record what ``run`` launches, without executing it. The function returned executes it and returns ``run``'s result."""


class CudaRecorder:
    """Captures with ``torch.cuda.CUDAGraph``.

    Raises:
        RuntimeError: there is no CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("GraphedStep needs a CUDA device, there is none")
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """On a stream of its own, as captures are: workspaces belong to a stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            outputs = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            outputs = run()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay


class GraphedStep:
    """Runs a training step as a CUDA graph: one launch for all of forward, local updates, backward and optimizer.

    ::

        def step(x, y):
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        graphed = GraphedStep(local, step)
        for epoch in range(90):
            for x, y in loader:
                total += graphed(x, y)      # one training step, graph or not
            local.step(total / len(loader))

    Every call is exactly one step. The first ``warmup`` calls run ``step`` as it is, the next one captures it; then it is replayed
    until something changes that a graph holds fast: the boundary, a hyper-parameter of an optimizer that is no tensor (a
    learning rate that changes in every step should be one, with ``fused=True``), training or evaluation mode, a loaded state,
    what :meth:`LocalizedLearning.keep_frozen` freezes (a ``requires_grad_`` of your own is not seen: call :meth:`reset`). Then
    all graphs are dropped and it begins anew. Mini-batches of another shape, and those for which
    :attr:`LocalizedLearning.refreshing` opens the prefix, have a graph of their own. The local learning rate and its sign are read
    on the device and need no new graph; what ``bn_stats="fold"`` has folded is brought up to date before a replay.

    What a step may not do in a graph, it may not do here (see PyTorch's notes): wait for the device, branch on values. Optimizers
    such as Adam need ``capturable=True``, autocast inside ``step`` needs ``cache_enabled=False``, and ``GradScaler`` waits.

    Args:
        local: an attached :class:`LocalizedLearning`, with the optimizers that ``step`` uses.
        step: called with the tensors of a mini-batch; returns a tensor or a container of tensors, typically the loss.
        warmup: steps that run as they are before each capture, at least 1.
        recorder: captures in another way than :class:`CudaRecorder`, for tests.
    Raises:
        ValueError: ``sample`` below 1, ``nan_policy="skip"`` or a ``ReplicatedModel``, with which something is decided on the host in
            every step; ``warmup`` below 1.
        RuntimeError: there is no CUDA device; in a call, layers whose update is deferred (used several times, checkpointed, or
            with gradients flowing through), which would be lost.
        TypeError: ``local``, ``step`` or ``warmup`` is not that; in a call, an argument that is no tensor.
    """

    def __init__(self, local: LocalizedLearning, step: Step, *, warmup: int = 3, recorder: Recorder | None = None) -> None:
        if not isinstance(local, LocalizedLearning):
            raise TypeError(f"local must be a LocalizedLearning, got {type(local).__name__}")
        if not callable(step):
            raise TypeError(f"step must be callable, got {type(step).__name__}")
        if isinstance(warmup, bool) or not isinstance(warmup, int):
            raise TypeError(f"warmup must be an int, got {warmup!r}")
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        _require_capturable(local)
        self._local, self._step, self._warmup = local, step, warmup
        self._recorder = CudaRecorder() if recorder is None else recorder
        self._settings: Any = None
        self._graphs: dict[Any, _Graph] = {}
        self._generation = 0
        self._drops = 0  # of all graphs, in calls one after the other
        self.captures = 0
        """Captures so far."""
        for optimizer in local._optimizers:  # it replaces the tensors that a graph writes
            optimizer.register_load_state_dict_post_hook(lambda _: self.reset())

    def reset(self) -> None:
        """Drop all graphs, after a change that is not seen here: weights that are other tensors, another ``step``."""
        self._generation += 1

    def __call__(self, *inputs: Tensor) -> Any:
        """One training step; returns what ``step`` returns, detached and copied."""
        for i, value in enumerate(inputs):
            if not isinstance(value, Tensor):
                raise TypeError(f"inputs must be tensors, got {type(value).__name__} as number {i}")
        settings = (self._generation, *_held_fast(self._local))
        if settings != self._settings:
            self._drop_graphs(settings)
        else:
            self._drops = 0
        key = (self._local.refreshing, *((x.shape, x.dtype, x.device, x.stride()) for x in inputs))
        graph = self._graphs.setdefault(key, _Graph())
        if graph.replay is not None:
            for static, x in zip(graph.inputs, inputs, strict=True):
                static.copy_(x, non_blocking=True)
            outputs = graph.replay()
            if self._local._refresher is not None:
                self._local._refresher.mini_batch_passed()  # of which the optimizers' hooks know nothing
        elif graph.steps < self._warmup:
            graph.steps += 1
            outputs = self._recorder.warm_up(lambda: self._step(*inputs))
            _require_written(self._local)
        else:
            graph.inputs = [x.clone() for x in inputs]
            replay = self._recorder.capture(lambda: self._step(*graph.inputs))
            self.captures += 1
            graph.replay = replay
            outputs = replay()
        return tree_map_only(Tensor, lambda t: t.detach().clone(), outputs)

    def _drop_graphs(self, settings: tuple[Any, ...]) -> None:
        """For other ``settings``. Says once that it comes to that in every call."""
        self._drops += 1
        if self._drops == _DROPS and self.captures == 0:
            warnings.warn(
                f"no step was captured in a CUDA graph so far: {_difference(self._settings, settings)} changed in each of the last "
                f"{_DROPS - 1} calls (an optimizer's hyper-parameter that does so should be a tensor, with fused=True)",
                UserWarning,
                stacklevel=3,
            )
        self._settings = settings
        self._graphs.clear()


def _require_capturable(local: LocalizedLearning) -> None:
    """Raise ``ValueError`` for what decides something on the host in every step."""
    if local.replicas is not None:
        raise ValueError(
            "local must be of a network in one process in a CUDA graph, got one of a ReplicatedModel, whose forward decides on the host what "
            "is reduced, waited for and written: a replay would leave that out"
        )
    if local._updater is not None and local._updater.sample < 1:
        raise ValueError(
            f"sample must be 1 in a CUDA graph, which would see the same slice for ever; got {local._updater.sample}"
        )
    if local._guard.policy == "skip":
        raise ValueError("nan_policy must be 'report' or 'raise' in a CUDA graph, as 'skip' waits for the device in every step")


def _held_fast(local: LocalizedLearning) -> tuple[Any, ...]:
    """What a captured step does not see change: it must be captured again."""
    groups = [group for optimizer in local._optimizers for group in optimizer.param_groups]
    settings = tuple(
        tuple((k, id(v) if isinstance(v, Tensor) else v) for k, v in group.items() if k != "params") for group in groups
    )
    kept = local._kept, 0 if local._freeze is None else local._freeze.forgotten
    # What is folded is written anew here, in place where that can be: a replay would not see that it should be.
    folded = 0 if local._freeze is None else local._freeze.fold()
    return local._plan is None, local.boundary, local.model.training, local._loads, kept, folded, settings


def _difference(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """What of :func:`_held_fast` is not the same."""
    for group, other in zip(before[-1], now[-1], strict=False):
        for (name, value), (_, value_now) in zip(group, other, strict=False):
            if value != value_now:
                return f"{name} of an optimizer's parameter group ({value} to {value_now})"
    return "boundary, mode, loaded state or what is frozen"


def _require_written(local: LocalizedLearning) -> None:
    """Raise ``RuntimeError`` if an update waits for the next forward."""
    waiting = local._updater.waiting if local._updater is not None else []
    if waiting:
        raise RuntimeError(
            f"a CUDA graph would lose the deferred updates of {', '.join(waiting)}: layers used several times in a forward, "
            "under activation checkpointing, or with gradients flowing through them"
        )


class _Graph:
    """What is there for one kind of mini-batch."""

    def __init__(self) -> None:
        self.steps = 0  # run as they are, so far
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], Any] | None = None
