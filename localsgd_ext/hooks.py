"""Hooks that do not survive the copying of their module, and what a hook can know about where it runs."""

from __future__ import annotations

from collections.abc import Callable
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
