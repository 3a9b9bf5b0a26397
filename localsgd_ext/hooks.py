"""Hooks and forwards that do not survive the copying of their module, and what they can know about where they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


def inert(*args: Any, **kwargs: Any) -> None:
    """What a hook of localized learning becomes in a copy of its module: nothing."""


def _restore() -> Callable[..., None]:
    return inert


class Hook:
    """A callable that hooks modules, and turns inert when its module is copied or pickled.

    ``copy.deepcopy(model)`` copies the hooks of its modules with them; a copy that went on updating (an EMA model, a
    snapshot for evaluation) would be a bug that is hard to find.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, ()


class CallHook(Hook):
    """Calls ``action(module)`` at the hook's place."""

    def __init__(self, action: Callable[[nn.Module], None]) -> None:
        self.action = action

    def __call__(self, module: nn.Module, *args: Any) -> None:
        self.action(module)


class OwnForward:
    """Stands in the place of ``forward`` on one module, which is still as its class made it: see :func:`unchanged`.

    In a copy of the module, pickled or not, its class's ``forward`` is there again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def install(self) -> None:
        """Put it there."""
        vars(self.module)["forward"] = self

    def take_off(self) -> None:
        """Take it off again, unless something else is there by now."""
        if vars(self.module).get("forward") is self:
            del vars(self.module)["forward"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        module = memo.get(id(self.module), self.module)
        return MethodType(type(module).forward, module)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")  # when this is loaded, the module's own attributes are not yet there


class Owner(Hook):
    """Marks a model, but none of its copies, as one that ``owner`` acts on."""

    NAME = "_localized_learning"

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    @classmethod
    def of(cls, model: nn.Module) -> Any:
        """Who acts on ``model``, or ``None``."""
        mark = vars(model).get(cls.NAME)
        return mark.owner if isinstance(mark, cls) else None

    def put_on(self, model: nn.Module) -> None:
        vars(model)[self.NAME] = self

    @classmethod
    def take_off(cls, model: nn.Module) -> None:
        vars(model).pop(cls.NAME, None)


def unchanged(module: nn.Module, base: type[nn.Module], *methods: str) -> bool:
    """Whether ``module``, an instance of ``base``, calls the same ``methods`` as any other."""

    def is_own(method: str) -> bool:
        there, own = vars(module).get(method), getattr(type(module), method)
        copied = isinstance(there, MethodType) and there.__self__ is module and there.__func__ is own
        return own is getattr(base, method) and (there is None or copied or isinstance(there, OwnForward))

    return all(is_own(method) for method in methods)


def is_ours(hook: object) -> bool:
    """Whether a hook is one of localized learning's."""
    return isinstance(hook, Hook) or hook is inert


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """A context in which no hook of localized learning acts on ``model`` and its parts."""
    hooked = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks) if hooks]
    before = [(hooks, dict(hooks)) for hooks in hooked]
    for hooks, those in before:
        for key in [key for key, hook in those.items() if is_ours(hook)]:
            del hooks[key]
    try:
        yield
    finally:
        for (
            hooks,
            those,
        ) in before:  # in their order; others may have come, or taken themselves off, as those of lazy modules do
            now = dict(hooks)
            hooks.clear()
            hooks.update({key: hook for key, hook in those.items() if is_ours(hook) or key in now} | now)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass: a forward here is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)


def under_checkpoint() -> bool:
    """Whether a non-reentrant ``torch.utils.checkpoint`` is recording: its pack hook is the innermost one then."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


def under_transform() -> bool:
    """Whether a ``torch.func`` transform (vmap, grad, jvp, functionalize, ...) is active: tensors are wrappers without memory."""
    return bool(torch._C._are_functorch_transforms_active())
