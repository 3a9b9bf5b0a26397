"""Freezing of the prefix for SGD: no gradients, no saved activations, no optimizer state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import stale_graphs
from .checks import require_numbers
from .folding import Fold
from .hooks import CallHook
from .layers import ExecutionPlan, Patterns, trace_layers
from .wrappers import refuse_wrappers, unwrap

BN_STATS = ("update", "freeze", "fold")


class PrefixFreeze:
    """Freezes every parameter that is first used before the transition layer.

    ``requires_grad`` is what stops back-propagation: nothing before the transition layer is part of the graph, whatever the
    topology, so no activation there is saved. Frozen parameters get ``grad = None`` (with zero gradients momentum and
    weight decay would go on moving them) and lose their optimizer state; the parameter groups stay as they are.

    What the user has frozen is not thawed: parameters that have ``requires_grad=False`` when the boundary passes them, that get it
    while the prefix is open (:meth:`set_open`), or are given to :meth:`forget`. One that is frozen here already has it, and to
    set it again leaves no trace.

    Args:
        model: the network ``plan`` was traced from.
        optimizers: their state for frozen parameters is dropped.
        bn_stats: ``"update"``: the running statistics of the prefix go on following the data; ``"freeze"``: its
            normalisation layers run in evaluation mode; ``"fold"``: the same to rounding, in less time: where nothing else reads
            the output of a layer than a BatchNorm directly behind it, the layer computes with weight and bias that do the
            BatchNorm's work too (see :class:`Fold`), for which there is a second copy of the prefix's weights. Not in evaluation
            mode nor in graphs of ``torch.compile``, where it is the same as ``"freeze"``. Called by itself in training mode, such a
            layer returns what its BatchNorm would.
        keep_state: keep the optimizers' state for frozen parameters, which :meth:`set_open` will let learn again.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ExecutionPlan,
        *,
        optimizers: Sequence[Optimizer] = (),
        bn_stats: str = "update",
        keep_state: bool = False,
    ) -> None:
        if bn_stats not in BN_STATS:
            raise ValueError(f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}")
        self.plan = plan
        self.bn_stats = bn_stats
        self.boundary = 0
        self.is_open = False
        self.forgotten = 0
        """Rises whenever something frozen here is found to be the user's: see :meth:`forget`."""
        self._keep_state = keep_state
        self._optimizers = optimizers
        self._parameters = dict(model.named_parameters())
        self._modules = dict(model.named_modules())
        self._frozen: dict[str, nn.Parameter] = {}
        self._norm_handles: list[Any] = []
        self._folds: dict[tuple[str, str], Fold] = {}  # of the present prefix and of earlier ones
        if bn_stats == "fold" and plan.foldable.pairs is None:
            warnings.warn(
                f"bn_stats='fold' folds nothing and does what 'freeze' does: {plan.foldable.why_not}", UserWarning, stacklevel=2
            )

    @property
    def frozen(self) -> list[str]:
        """Names of the parameters frozen here; those the user has frozen are not among them."""
        return [name for name, parameter in self._frozen.items() if parameter.requires_grad or not self.is_open]

    @property
    def norms(self) -> list[str]:
        """Names of the prefix's modules with running statistics."""
        return self.plan.prefix(self.plan.norms, self.boundary)

    def set_boundary(self, boundary: int) -> None:
        """Freeze what comes before layer ``boundary`` and thaw what does not.

        Raises:
            ValueError: ``boundary`` is not the index of a layer.
        """
        if not 0 <= boundary < len(self.plan):
            raise ValueError(f"boundary must be in [0, {len(self.plan) - 1}], got {boundary}")
        self.set_open(False)
        before = dict(self._frozen)
        self.boundary = boundary
        prefix = set(self.plan.prefix(self.plan.parameters, boundary))
        for name in [name for name in self._frozen if name not in prefix]:
            self._thaw(self._frozen.pop(name))
        for name in prefix:
            parameter = self._parameters[name]
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen[name] = parameter
                parameter.grad = None
                for optimizer in () if self._keep_state else self._optimizers:
                    optimizer.state.pop(parameter, None)
        for handle in self._norm_handles:
            handle.remove()
        self._norm_handles = []
        if self.bn_stats != "update":
            for name in self.norms:
                module, hook = self._modules[name], _EvalMode()
                self._norm_handles += [
                    module.register_forward_pre_hook(hook.enter),
                    module.register_forward_hook(hook.leave, always_call=True),
                ]
        self._install_folds()
        if self._frozen != before:
            stale_graphs.drop()

    def set_open(self, is_open: bool, *, keep_gradients_of: Collection[Optimizer] = ()) -> None:
        """Let gradients through what is frozen here, or stop them again; they are dropped then.

        Args:
            keep_gradients_of: optimizers whose parameters keep them, until :meth:`drop_gradients`.
        """
        if is_open == self.is_open:
            return
        self.is_open = is_open
        stale_graphs.drop()
        if is_open:
            self._install_folds()
            for parameter in self._frozen.values():
                parameter.requires_grad_(True)
                self._complete_state(parameter)
            return
        theirs = [parameter for parameter in self._frozen.values() if not parameter.requires_grad]
        for parameter in theirs:
            parameter.grad = None
        self.forget(theirs)
        kept = {parameter for optimizer in keep_gradients_of for parameter in self._frozen_of(optimizer)}
        for parameter in self._frozen.values():
            parameter.requires_grad_(False)
            if parameter not in kept:
                parameter.grad = None
        self._install_folds()

    def fold(self) -> int:
        """Fold anew what has changed, as the next forward would; returns how often that made other tensors so far."""
        for pair in self._folded_pairs():
            self._folds[pair].tensors()
        return sum(fold.replaced for fold in self._folds.values())  # the same while the prefix is open

    def _folded_pairs(self) -> list[tuple[str, str]]:
        if self.bn_stats != "fold" or self.is_open:
            return []
        norms = set(self.norms)
        return [pair for pair in self.plan.foldable.pairs or () if pair[1] in norms]

    def _install_folds(self) -> None:
        wanted = self._folded_pairs()
        for pair in self._folds.keys() - wanted:
            self._folds[pair].take_off()
        for pair in wanted:
            if pair not in self._folds:  # kept, as torch.compile would compile again for another object
                self._folds[pair] = Fold(*(self._modules[name] for name in pair))
            self._folds[pair].install()

    def forget(self, parameters: Collection[nn.Parameter]) -> None:
        """From now on these are as the user has them: nothing here thaws them."""
        theirs = set(parameters)
        kept = {name: parameter for name, parameter in self._frozen.items() if parameter not in theirs}
        self.forgotten += len(kept) < len(self._frozen)
        self._frozen = kept

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Of what is frozen and ``optimizer`` has."""
        for parameter in self._frozen_of(optimizer):
            parameter.grad = None

    def has_gradients(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` has gradients of the prefix."""
        return any(parameter.grad is not None for parameter in self._frozen_of(optimizer))

    def _frozen_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        members = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self._frozen.values() if parameter in members]

    def _thaw(self, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(True)
        self._complete_state(parameter)

    def _complete_state(self, parameter: nn.Parameter) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
                members = group["params"]
                others = any("momentum_buffer" in optimizer.state.get(p, {}) for p in members)
                missing = "momentum_buffer" not in optimizer.state.get(parameter, {})
                if group["fused"] and others and missing and any(p is parameter for p in members):
                    # torch's fused SGD fails where some parameters of a group have a momentum buffer and some have none.
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def poisoned_norms(self) -> list[str]:
        """Modules of the whole network whose running statistics are no longer finite: one bad batch does that for good."""
        names = [name for name in self.plan.norms if self._modules[name].track_running_stats]
        if not names:
            return []
        finite = [
            torch.isfinite(self._modules[name].running_mean).all() & torch.isfinite(self._modules[name].running_var).all()
            for name in names
        ]
        return [name for name, ok in zip(names, finite, strict=True) if not ok]

    def remove(self) -> None:
        """Thaw everything that was frozen here."""
        self.set_boundary(0)
        self._folds.clear()


class _EvalMode:
    """Runs a normalisation layer in evaluation mode, for the length of its forward."""

    def __init__(self) -> None:
        self.enter = CallHook(self._enter)
        self.leave = CallHook(self._leave)
        self._training = False

    def _enter(self, module: nn.Module) -> None:
        self._training, module.training = module.training, False

    def _leave(self, module: nn.Module) -> None:
        module.training = self._training


def freeze_prefix(
    model: nn.Module,
    boundary: int | float,
    *example_inputs: Any,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    bn_stats: str = "update",
    include: Patterns = None,
    skip: Patterns = None,
) -> PrefixFreeze:
    """Freeze the layers of ``model`` that run before layer ``boundary``: the baseline localized learning has to beat.

    Args:
        boundary: index of the first layer that goes on learning, in execution order, or a fraction of the depth in (0, 1), of which
            whole layers count.
        example_inputs: what ``model`` is called with; one forward is run to find the order (nothing is changed by it).
        optimizer: its state for the frozen parameters is dropped.
        bn_stats: see :class:`PrefixFreeze`.
        include, skip: which modules count as layers, see :func:`localsgd_ext.trace_layers`.
    Returns:
        A handle: ``remove()`` thaws the prefix, ``set_boundary()`` moves it.
    Raises:
        ValueError: ``boundary`` out of range, or the model has no layer.
        TypeError: ``boundary`` is no number.
    """
    model, _ = unwrap(model)
    refuse_wrappers(model)
    require_numbers(boundary=boundary)
    whole = isinstance(boundary, Integral)
    if not whole and not 0 < boundary < 1:
        raise ValueError(f"boundary must be the index of a layer or a fraction in (0, 1), got {boundary}")
    optimizers = as_optimizers(optimizer, model)
    plan = trace_layers(model, *example_inputs, include=include, skip=skip)
    index = int(boundary) if whole else math.floor(boundary * len(plan))
    if not whole and index == 0:
        warnings.warn(
            f"nothing is frozen: boundary={boundary} of {len(plan)} layers is less than one", UserWarning, stacklevel=2
        )
    freeze = PrefixFreeze(model, plan, optimizers=optimizers, bn_stats=bn_stats)
    freeze.set_boundary(index)
    return freeze


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None, model: nn.Module) -> tuple[Optimizer, ...]:
    """One optimizer, several or none as a tuple, each once. Warns if they have no parameter of ``model``.

    Raises:
        TypeError: something that is not an optimizer.
        ValueError: ``LBFGS``, which keeps one state for all parameters together.
    """
    if optimizer is None:
        return ()
    optimizers = tuple(optimizer) if isinstance(optimizer, Iterable) else (optimizer,)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got {type(each).__name__}")
        if isinstance(each, torch.optim.LBFGS):
            raise ValueError("optimizer must keep its state per parameter, LBFGS does not")
    theirs = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
    if theirs and set(theirs).isdisjoint(model.parameters()):
        warnings.warn(
            f"optimizer ({', '.join(type(each).__name__ for each in optimizers)}) has no parameter of the model: was it made for another, "
            "or an older copy?",
            UserWarning,
            stacklevel=3,
        )
    return tuple(dict.fromkeys(optimizers))
