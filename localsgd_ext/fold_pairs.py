"""Which BatchNorm modules can be folded into the layer before them, found while one training forward is watched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_iter

from .hooks import is_ours, unchanged

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Questions about a tensor that do not read its values.
_QUESTIONS = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr",
              "is_contiguous", "is_floating_point", "is_complex", "get_device", "__len__"}  # fmt: skip


@dataclass(frozen=True)
class Foldable:
    """Pairs of a layer and the BatchNorm that alone reads its output; ``None``: not known, and why."""

    pairs: tuple[tuple[str, str], ...] | None
    why_not: str = ""

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": None if self.pairs is None else [list(pair) for pair in self.pairs], "why_not": self.why_not}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any] | None) -> Foldable:
        """The pairs as saved; ``None``: by a version that saved none."""
        if state is None:
            return NOT_SAVED
        pairs = state["pairs"]
        return cls(None if pairs is None else tuple((layer, norm) for layer, norm in pairs), state["why_not"])


NOT_SAVED = Foldable(None, "the order of the layers is of a state saved before there was folding")


def is_watched(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether a hook that is not ours would see what the layer hands to the BatchNorm."""
    return (
        not all(map(is_ours, layer._forward_hooks.values()))
        or not all(map(is_ours, norm._forward_pre_hooks.values()))
        or any(hooks for module in (layer, norm) for hooks in (module._backward_hooks, module._backward_pre_hooks))
        or bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)
    )


@dataclass(eq=False)
class _Output:
    """What a layer returned, and who read it."""

    layer: nn.Module
    tensor: Callable[[], Tensor | None]
    version: int
    node: Any
    reads: int = 0
    norm: nn.Module | None = None
    norm_node: Any = None
    kept: Tensor | None = None
    """The tensor itself, once a BatchNorm has read it, which keeps it for its backward anyway."""


class FoldFinder:
    """Watches what becomes of the layers' outputs in one forward."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] = {}  # by id(tensor)
        self._by_norm: dict[nn.Module, _Output] = {}
        self._compiled = False

    def watch(self, model: nn.Module, layer_types: tuple[type[nn.Module], ...]) -> list[Any]:
        """Hook the layers and the normalisation modules; returns the handles."""
        handles: list[Any] = []
        for module in model.modules():
            if isinstance(module, layer_types):
                handles.append(module.register_forward_hook(self._layer_ran))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(self._norm_called, with_kwargs=True))
                handles.append(module.register_forward_hook(self._norm_ran))
        return handles

    def _layer_ran(self, layer: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # which breaks the graph at what is asked here
            self._compiled = True
        elif isinstance(output, Tensor) and output.grad_fn is not None:
            self._outputs[id(output)] = _Output(layer, weakref.ref(output), output._version, output.grad_fn)

    def _norm_called(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = [*args, *kwargs.values()]
        found = self._find(given[0]) if len(given) == 1 else None
        if found is not None and found.version == given[0]._version:
            found.norm, found.kept = norm, given[0]
            self._by_norm[norm] = found

    def _norm_ran(self, norm: nn.Module, args: Any, output: Any) -> None:
        found = None if torch.compiler.is_compiling() else self._by_norm.get(norm)
        if found is not None and isinstance(output, Tensor):
            found.norm_node = output.grad_fn

    def read(self, func: Any, tensors: Sequence[Tensor], result: Any) -> None:
        """A torch function was called with ``tensors``."""
        if torch.compiler.is_compiling():
            return
        if getattr(func, "__name__", "") in _QUESTIONS and not any(isinstance(leaf, Tensor) for leaf in tree_iter(result)):
            return
        for tensor in tensors:
            found = self._find(tensor)
            if found is not None:
                found.reads += 1

    def _find(self, tensor: Any) -> _Output | None:
        found = self._outputs.get(id(tensor))
        return found if found is not None and found.tensor() is tensor else None

    def found(
        self,
        modules: Mapping[str, nn.Module],
        calls: Mapping[str, int],
        output: Any,
        is_plain: Callable[[nn.Module], bool],
    ) -> Foldable:
        """The pairs, in the order of the forward, which has ended and returned ``output``.

        Args:
            modules: of the model, by name.
            calls: of each module, by name.
            is_plain: whether a layer computes what its class does.
        """
        if self._compiled:
            return Foldable(None, "the first training forward was compiled, which hides it: call trace() before")
        names = {module: name for name, module in modules.items()}
        outputs = [
            each
            for norm, each in self._by_norm.items()
            if is_plain(each.layer)
            and type(each.layer._parameters.get("weight")) is nn.Parameter
            and isinstance(norm, NORM_TYPES)
            and unchanged(norm, _BatchNorm, "forward")
            and norm.running_mean is not None
            and norm.running_var is not None
            and calls[names[each.layer]] == calls[names[norm]] == 1
            and each.reads == 1  # by the BatchNorm
            and each.node is not None
            and each.norm_node is not None
            and each.kept is not None
            and each.kept.dim() == each.layer.weight.dim()  # type: ignore[operator]  # BatchNorm's channels are the layer's
            and not is_watched(each.layer, norm)
        ]
        if not outputs:
            return Foldable(())
        roots = {leaf.grad_fn for leaf in tree_iter(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
        if not roots:
            return Foldable(
                None,
                f"the model's output, of type {type(output).__name__}, shows no tensor that requires gradients, from which to see who "
                "reads the layers' outputs",
            )
        consumers = _consumers(roots, {each.node for each in outputs})
        held = _held_elsewhere(outputs)
        pairs = [
            (names[each.layer], names[norm])
            for each in outputs
            if (norm := each.norm) is not None and consumers[each.node] == [each.norm_node] and id(each.kept) not in held
        ]
        return Foldable(tuple(pairs))


def _consumers(roots: Iterable[Any], wanted: set[Any]) -> dict[Any, list[Any]]:
    """The nodes of the autograd graph behind ``roots`` that take what each of ``wanted`` returned."""
    consumers: dict[Any, list[Any]] = {node: [] for node in wanted}
    seen, waiting = set(roots), list(roots)
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following in consumers:
                consumers[following].append(node)
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return consumers


def _held_elsewhere(outputs: Sequence[_Output]) -> set[int]:
    """Ids of the tensors that something has kept to read later: an attribute, a list, a closure, what the model returned."""
    tensors = [each.kept for each in outputs]
    ours = {id(tensors), *map(id, outputs), *(id(vars(each)) for each in outputs)}
    holders = [one for one in gc.get_referrers(*tensors) if id(one) not in ours and not isinstance(one, FrameType)]
    return {id(tensor) for holder in holders for tensor in gc.get_referents(holder)}
