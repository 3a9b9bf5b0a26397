"""Which modules are layers, and in which order they run.

A *layer* is a convolution or linear module that localized learning may update. Registration order says nothing about when a
module runs, so one training forward is watched: module calls through pre-hooks, uses of parameters through a
``TorchFunctionMode``. The outcome is an :class:`ExecutionPlan`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import multimode
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from .fold_pairs import NOT_SAVED, Foldable, FoldFinder
from .hooks import set_aside, unchanged

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Patterns = str | re.Pattern[str] | Iterable[str | re.Pattern[str]] | None


@dataclass(frozen=True)
class ExecutionPlan:
    """What one training forward of a network uses, in the order of first use.

    Positions count module calls and uses of parameters from the start of the forward; only their order means anything.
    """

    layers: tuple[str, ...]
    """Names of the layers in execution order; ``L = len(layers)``."""
    positions: tuple[int, ...]
    """Position of each layer's first call."""
    calls: tuple[int, ...]
    """How often each layer is called in one forward."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each layer's weight."""
    parameters: Mapping[str, int]
    """Position of the first use of every parameter that is used."""
    norms: Mapping[str, int]
    """Position of the first call of every module that keeps running statistics."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Convolution and linear modules that are no layers, and why; without those the user left out."""
    foldable: Foldable = NOT_SAVED
    """Layers directly before a BatchNorm that nobody else reads."""

    def __len__(self) -> int:
        return len(self.layers)

    def prefix(self, positions: Mapping[str, int], boundary: int) -> list[str]:
        """The names in ``positions`` that come before the transition layer ``layers[boundary]``."""
        if boundary == 0:
            return []
        end = self.positions[boundary]
        return [name for name, position in positions.items() if position < end]

    def state_dict(self) -> dict[str, Any]:
        """The plan as strings, numbers and containers of them."""
        return {
            "layers": list(self.layers),
            "positions": list(self.positions),
            "calls": list(self.calls),
            "shapes": [list(shape) for shape in self.shapes],
            "parameters": dict(self.parameters),
            "norms": dict(self.norms),
            "foldable": self.foldable.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], model: nn.Module) -> ExecutionPlan:
        """The plan as saved, after checking that ``model`` is the network it was made from."""
        plan = cls(
            layers=tuple(state["layers"]),
            positions=tuple(state["positions"]),
            calls=tuple(state["calls"]),
            shapes=tuple(tuple(shape) for shape in state["shapes"]),
            parameters=dict(state["parameters"]),
            norms=dict(state["norms"]),
            foldable=Foldable.from_state_dict(state.get("foldable")),
        )
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for name, shape in zip(plan.layers, plan.shapes, strict=True):
            if not isinstance(modules.get(name), LAYER_TYPES):
                raise ValueError(f"the state is of another network: this one has no convolution or linear layer {name!r}")
            found = tuple(modules[name].weight.shape)
            if found != shape:
                raise ValueError(
                    f"the state is of another network: the weight of {name!r} has shape {found} here, {shape} there"
                )
        named = (*plan.norms, *(name for pair in plan.foldable.pairs or () for name in pair))
        missing = [name for name in plan.parameters if name not in parameters] + [n for n in named if n not in modules]
        if missing:
            raise ValueError(f"the state is of another network: this one has no {', '.join(map(repr, missing))}")
        return plan


def trace_layers(model: nn.Module, *args: Any, include: Patterns = None, skip: Patterns = None, **kwargs: Any) -> ExecutionPlan:
    """Run one training forward of ``model(*args, **kwargs)`` and return its :class:`ExecutionPlan`.

    Parameters, buffers (BatchNorm's running statistics) and the random number generators are left as they were; hooks of
    localized learning do not act.

    Args:
        include, skip: names or regular expressions (matched in full) of the modules that may be, may not be, layers.
    Raises:
        ValueError: a pattern matches no convolution or linear module, or the model has no layer.
    """
    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        return trace_as_it_is(model, args, kwargs, include=include, skip=skip)
    finally:
        for module, mode in training.items():
            module.training = mode


def trace_as_it_is(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, include: Patterns = None, skip: Patterns = None
) -> ExecutionPlan:
    """:func:`trace_layers` with every module in the mode that it has."""
    lazy = [module for module in model.modules() if any(is_lazy(buffer) for buffer in module.buffers(recurse=False))]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    tracer = Tracer(model, include=include, skip=skip)
    try:
        with set_aside(model), torch.random.fork_rng(devices=devices), torch.enable_grad(), tracer.watching():
            output = model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for module in lazy:  # materialised by this forward, which its statistics are not to remember
            if not any(is_lazy(buffer) for buffer in module.buffers(recurse=False)) and hasattr(module, "reset_running_stats"):
                module.reset_running_stats()  # type: ignore[operator]
    return tracer.plan(output)


class Tracer:
    """Watches one forward of a model."""

    def __init__(self, model: nn.Module, *, include: Patterns = None, skip: Patterns = None) -> None:
        self.model = model
        self.selected = select_names(model, include, skip)
        self._clock = 0
        self._first_call: dict[str, int] = {}
        self._calls: Counter[str] = Counter()
        self._without_grad: set[str] = set()
        self._first_use: dict[int, int] = {}  # id(parameter) -> position
        self._folds = FoldFinder()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the model's forward is recorded."""
        stop = self.start()
        try:
            yield
        finally:
            stop()

    def start(self) -> Callable[[], None]:
        """Begin to record; the returned function ends it."""
        handles = [
            module.register_forward_pre_hook(self._call_recorder(name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule) or name == ""
        ]
        handles += self._folds.watch(self.model, LAYER_TYPES)
        mode = _ParameterUse({id(p) for p in self.model.parameters()}, self._use, self._folds.read)
        mode.__enter__()  # type: ignore[no-untyped-call]

        def stop() -> None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            for handle in handles:
                handle.remove()

        return stop

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _call_recorder(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._first_call.setdefault(name, self._tick())
            self._calls[name] += 1
            if not torch.is_grad_enabled():
                self._without_grad.add(name)

        return record

    def _use(self, parameter: int) -> None:
        self._first_use.setdefault(parameter, self._tick())

    def plan(self, output: Any) -> ExecutionPlan:
        """The plan of the recorded forward, which returned ``output``.

        Raises:
            ValueError: no layer is left.
        """
        modules = dict(self.model.named_modules())
        left_out: dict[str, str] = {}
        layers: list[str] = []
        owners = _weight_owners(self.model)
        registered = [name for name in modules if name in self.selected]
        for name in sorted(registered, key=lambda n: self._first_call.get(n, self._clock)):  # never called: last
            reason = _why_no_layer(modules[name], owners)
            if reason is None and name not in self._calls:
                reason = "it was not called in the forward"
            if reason is None and name in self._without_grad:
                reason = "it ran without gradients (torch.no_grad, or checkpointing with use_reentrant=True: use False)"
            if reason is None:
                layers.append(name)
            else:
                left_out[name] = reason
        if not layers:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
            raise ValueError(
                f"model must have at least one convolution or linear layer to learn locally{': ' + why if why else ''}"
            )
        return ExecutionPlan(
            layers=tuple(layers),
            positions=tuple(self._first_call[name] for name in layers),
            calls=tuple(self._calls[name] for name in layers),
            shapes=tuple(tuple(modules[name].weight.shape) for name in layers),
            parameters=self._parameter_positions(modules),
            norms={n: self._first_call[n] for n, m in modules.items() if n in self._first_call and _keeps_statistics(m)},
            left_out=left_out,
            foldable=self._folds.found(modules, self._calls, output, is_plain),
        )

    def _parameter_positions(self, modules: Mapping[str, nn.Module]) -> dict[str, int]:
        positions = {}
        for name, parameter in self.model.named_parameters():
            owner = name.rpartition(".")[0]
            position = self._first_use.get(id(parameter))
            if position is None:  # not seen by any torch function (custom autograd function): its module's call tells
                position = self._first_call.get(owner)
            if position is not None:
                positions[name] = position
        return positions


_GRAD: Any = vars(torch._C.TensorBase)["grad"].__get__  # what reading ``parameter.grad`` calls


class _ParameterUse(TorchFunctionMode):
    """Reports every torch function that reads the value of a parameter; of all others, ``also`` is told what they read."""

    def __init__(self, parameters: set[int], report: Callable[[int], None], also: Callable[..., None]) -> None:
        super().__init__()
        self._parameters = parameters
        self._report = report
        self._also = also

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        self._also(func, leaves, result)
        used = [id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter)]
        if used and func != _GRAD:
            made = {id(leaf) for leaf in tree_iter(result) if isinstance(leaf, Tensor)}
            # Questions (size(), dtype, …) make no tensor; what hands the parameter itself back (to, requires_grad_) is no use yet.
            for parameter in used:
                if parameter in self._parameters and made and parameter not in made:
                    self._report(parameter)
        return result


def report_left_out(plan: ExecutionPlan) -> None:
    """One warning that names every convolution and linear module that was left out, and why."""
    if plan.left_out:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in plan.left_out.items())
        warnings.warn(
            "left out of localized learning (trained by SGD; frozen where the boundary passes them):\n" + lines,
            UserWarning,
            stacklevel=2,
        )


def select_names(model: nn.Module, include: Patterns = None, skip: Patterns = None, *, argument: str = "include") -> set[str]:
    """Names of the convolution and linear modules that ``include`` and ``skip`` allow.

    Args:
        argument: what the user calls ``include``.
    Raises:
        ValueError: a pattern matches none of them, or ``include`` is empty.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LAYER_TYPES)]
    selected = set(names) if include is None else _matching(names, include, argument)
    return selected if skip is None else selected - _matching(names, skip, "skip")


def _matching(names: Sequence[str], patterns: Patterns, argument: str) -> set[str]:
    listed = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    matched: set[str] = set()
    if not listed and argument != "skip":
        raise ValueError(f"{argument} must name at least one layer, got {patterns!r} (None: all of them)")
    for pattern in listed:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"{argument} must be a name or regular expression, or several, got {pattern!r}")
        try:
            found = {name for name in names if name == pattern or re.fullmatch(pattern, name)}
        except re.error as error:
            raise ValueError(f"{argument} must hold names or regular expressions, got {pattern!r}: {error}") from None
        if not found:
            text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            raise ValueError(f"{argument} must match convolution or linear modules of the model, {text!r} matches none")
        matched |= found
    return matched


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` computes what its class in torch.nn computes: no changed ``forward``."""
    base = next((cls for cls in LAYER_TYPES if isinstance(module, cls)), None)
    if base is None:
        return False
    return unchanged(module, base, *(("forward",) if base is nn.Linear else ("forward", "_conv_forward")))


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _why_no_layer(module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    weight = module._parameters.get("weight")
    if not is_plain(module):
        return f"{type(module).__name__} changes the forward of its torch.nn class"
    if weight is None:
        return "its weight is computed from other parameters (parametrized, weight- or spectral-normalised, pruned)"
    if len(owners.get(id(weight), ())) > 1:
        return f"its weight is shared: {', '.join(owners[id(weight)])}"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad is False)"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return None


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "track_running_stats")


def recurring_block_size(model: nn.Module, plan: ExecutionPlan) -> int:
    """Layers in the network's recurring block: 2 in a basic ResNet, 3 with bottlenecks and in MobileNetV2 (paper, section 2.2).

    The block is the module class with most instances among those that hold at least two layers, the outermost where
    classes tie. Networks without one (VGG) get 7.5 % of their depth, the middle of the paper's 5-10 % (section 3.3).
    """
    sizes: dict[type[nn.Module], list[int]] = {}
    for name, module in model.named_modules():
        if name and type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            count = sum(1 for layer in plan.layers if layer.startswith(name + "."))
            if count >= 2:
                sizes.setdefault(type(module), []).append(count)
    # Where as many blocks have a shortcut as have none, the block is the one without: the smallest of the commonest sizes.
    blocks = [(len(counts), min(multimode(counts))) for counts in sizes.values() if len(counts) >= 2]
    return max(blocks)[1] if blocks else max(1, round(0.075 * len(plan)))
