"""Where the forward of a network can begin when what comes before is known: behind a module on which alone all the rest depends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .layers import ExecutionPlan, no_trace

_OVERRIDE = "_compiled_call_impl"  # what ``module(...)`` calls instead of hooks and ``forward``, where it is set
_WRITES = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
                                                       "lshift", "rshift"))}  # fmt: skip
_PICTURES = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Call:
    """Of a module: what it returned, without the values, and when it had."""

    end: int
    output: Any


@dataclass(frozen=True)
class Cut:
    """The module whose output the rest of the network begins with, and those that then need not run."""

    module: str
    skipped: tuple[str, ...]
    """Without the modules inside of them."""
    overwritten: bool = False
    """Whether the rest of the network writes into that output."""


@dataclass
class Forward:
    """The calls of one forward, by module in the order in which they ended, and what a tensor that was asked for came to."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    begin: dict[str, int] = field(default_factory=dict)
    """When each module was first called."""

    def skipped_outputs(self, cut: Cut) -> dict[str, tuple[Any, ...]]:
        return {name: tuple(call.output for call in self.calls[name]) for name in cut.skipped}


def on_meta(value: Any) -> Any:
    """``value`` with tensors that have shapes, strides and dtypes only."""
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value)


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """A context for forwards that leave no trace and of which torch.compile makes no graphs."""
    with no_trace(model, aside=False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: str | None = None) -> tuple[Forward, Any]:
    """A forward that leaves no trace, and what module ``keep`` returned in it."""
    seen, kept, clock = Forward(), [], iter(range(1 << 62))

    def before(name: str) -> Any:
        def record(module: nn.Module, args: Any) -> None:
            seen.begin.setdefault(name, next(clock))

        return record

    def after(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            seen.calls[name].append(Call(next(clock), on_meta(output)))
            if name == keep:
                kept.append(output.clone())

        return record

    with _plainly(model):
        handles = [module.register_forward_pre_hook(before(name)) for name, module in model.named_modules()]
        handles += [module.register_forward_hook(after(name)) for name, module in model.named_modules()]
        try:
            model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    return seen, kept[-1] if kept else None


def find_cut(
    model: nn.Module, plan: ExecutionPlan, boundary: int, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Cut | None:
    """The last module before layer ``boundary`` from whose output alone, without ``x``, the rest of ``model(*args, **kwargs)``
    follows; ``None``: there is none.

    Each candidate is tried: the rest must run on a tensor of that shape while ``x``, and all else that comes before, has no
    values. Forwards that change nothing, in the mode that ``model`` is in.
    """
    seen, _ = watch(model, args, kwargs)
    limit = seen.begin.get(plan.layers[boundary], 0)
    # What a layer with a BatchNorm folded into it puts out is not what it would put out by itself.
    unfit = {"", *(layer for layer, _ in plan.foldable.pairs or ())}
    compiled = {name for name, module in model.named_modules() if _OVERRIDE in vars(module) or hasattr(module, "_orig_mod")}
    candidates = [
        name
        for name, calls in seen.calls.items()
        if name not in unfit and len(calls) == 1 and calls[0].end < limit and isinstance(calls[0].output, Tensor)
        if not _inside(name, compiled)
    ]
    # Who hands pictures to the model in a memory format of theirs may ask for it again: what is no picture would refuse it.
    pictures = x.dim() in _PICTURES and x.is_contiguous(memory_format=_PICTURES[x.dim()]) and not x.is_contiguous()
    made = {name: seen.calls[name][0] for name in candidates}
    candidates.sort(key=lambda name: (pictures and made[name].output.dim() == x.dim(), made[name].end), reverse=True)
    for name in candidates:
        end = seen.calls[name][0].end
        before = {other for other, calls in seen.calls.items() if calls[-1].end < end and not _inside(other, (name,))}
        cut = Cut(name, tuple(other for other in before if not _inside(other, before - {other})))
        overwritten = _follows(model, cut, seen, x, args, kwargs)
        if overwritten is not None:
            return replace(cut, overwritten=overwritten)
    return None


def _inside(name: str, others: Any) -> bool:
    """Whether ``name`` is the name of a module inside of one of ``others``; ``""`` has all others in it."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in others for count in range(len(parts)))


def _follows(
    model: nn.Module, cut: Cut, seen: Forward, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool | None:
    """Whether the rest of the network writes into what the cut puts out; ``None``: it needs more than that."""
    made = seen.calls[cut.module][0].output
    z = torch.zeros(made.shape, dtype=made.dtype, device=x.device)
    version = z._version
    args, kwargs = instead_of(x, on_meta(x), args, kwargs)
    skip = Skip(model, cut)
    try:
        with _plainly(model), skip.beginning_with(z, seen.skipped_outputs(cut)), _Unmixed(skip):
            output = model(*args, **kwargs)
    except Exception:  # whatever a model raises for a tensor without values
        return None
    if not skip.used or any(t.is_meta for t in tree_iter(output) if isinstance(t, Tensor)):
        return None
    return z._version != version


def instead_of(
    x: Tensor, other: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` and ``kwargs`` with ``other`` in the place of ``x``."""
    return tree_map_only(Tensor, lambda t: other if t is x else t, (args, dict(kwargs)))  # type: ignore[no-any-return]


class _Unmixed(TorchDispatchMode):
    """Behind the cut, raises where an operation takes tensors with and without values: some in-place ones say nothing and do
    nothing."""

    def __init__(self, skip: Skip) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._skip = skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._skip.used and _is_mixed(args, kwargs):
            raise ValueError(f"{func} needs what comes before the cut")
        return func(*args, **(kwargs or {}))


class _WithoutValues(TorchFunctionMode):
    """Until the cut is reached, what is computed from something without values has none either.

    Raises ``ValueError`` where such a thing would be written into a tensor with values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.passed and _is_mixed(args, kwargs):
            name = getattr(func, "__name__", "")
            in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
            written = tree_iter((args[:1] if in_place else (), kwargs.get("out")))
            if any(isinstance(leaf, Tensor) and not leaf.is_meta for leaf in written):
                raise ValueError(f"{name} writes what comes before the cut")
            args, kwargs = on_meta((args, kwargs))
        return func(*args, **kwargs)


def _is_mixed(*values: Any) -> bool:
    return len({leaf.is_meta for leaf in tree_iter(values) if isinstance(leaf, Tensor)}) > 1


class _Override:
    """What ``module(...)`` is instead of its hooks and its ``forward``, until it is taken off. Copies of the module have none."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self._module, self._before = module, vars(module).get(_OVERRIDE)
        vars(module)[_OVERRIDE] = call

    def take_off(self) -> None:
        if self._before is None:
            vars(self._module).pop(_OVERRIDE, None)
        else:
            vars(self._module)[_OVERRIDE] = self._before


def tell(module: nn.Module, action: Callable[[Any], None]) -> Callable[[], None]:
    """From now on ``action(output)`` is called with what ``module`` returns, compiled or not; the returned function ends it."""
    call = vars(module).get(_OVERRIDE) or module._call_impl

    def told(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        action(output)
        return output

    return _Override(module, told).take_off


class Skip:
    """Lets forwards of ``model`` begin behind ``cut``: the modules before it return tensors without values, it returns what is given.

    No hook of those modules runs.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.used = False
        """Whether the forward has reached the cut."""
        self._cut, self._overwritten = model.get_submodule(cut.module), cut.overwritten
        self._skipped = {name: model.get_submodule(name) for name in cut.skipped}
        self._overrides: list[_Override] = []
        self._mode: _WithoutValues | None = None

    def begin(self, z: Tensor, outputs: Mapping[str, Sequence[Any]]) -> None:
        """For the next forward, until :meth:`end`; ``outputs``: of the skipped modules, call by call (see :func:`on_meta`)."""
        self.used = False

        def reached(*_: Any, **__: Any) -> Tensor:
            self.used = True
            self._leave_mode()
            return z.clone() if self._overwritten else z

        self._overrides = [_Override(self._cut, reached)]
        self._overrides += [_Override(module, _Outputs(outputs[name])) for name, module in self._skipped.items()]
        self._mode = _WithoutValues()
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """The modules are as before."""
        self._leave_mode()
        if self._mode is not None:  # others were within it
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None
        for override in self._overrides:
            override.take_off()
        self._overrides = []

    @contextmanager
    def beginning_with(self, z: Tensor, outputs: Mapping[str, Sequence[Any]]) -> Iterator[None]:
        """A context for one forward."""
        self.begin(z, outputs)
        try:
            yield
        finally:
            self.end()

    def _leave_mode(self) -> None:
        """Where it is the innermost one: what comes next is not to be slowed down by it."""
        if self._mode is None:
            return
        self._mode.passed = True
        if _get_current_function_mode() is self._mode:  # type: ignore[no-untyped-call]
            self._mode.__exit__(None, None, None)
            self._mode = None


class _Outputs:
    """Stands for a module that returned these."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self._outputs = iter(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A view, so that what is done to its shape in place is not done to the next forward's.
        return tree_map_only(Tensor, Tensor.detach, next(self._outputs))
