"""Localized learning inside the user's own training loop (LoCal+SGD)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import number
from .epoch_report import EpochReport
from .first_forward import FirstForward
from .freezing import PrefixFreeze, as_optimizers
from .hooks import Owner
from .layers import ExecutionPlan, Patterns, recurring_block_size, report_left_out, select_names
from .learning_state import STATE_FORMAT, checked_plan
from .nonfinite import NonFiniteGuard
from .presets import AUTO, PRESETS, choose
from .refresh import Every, Refresh, Refresher
from .selection import ModeSelection
from .supervision import WeakSupervision
from .update_norm import UpdateNorm
from .updater import Activation, HebbianUpdater
from .wrappers import refuse_wrappers, unwrap

__all__ = ["PRESETS", "LocalizedLearning"]

NOT_TRACED = "the order of the layers is not known before the first training forward: run one, or call trace()"


class LocalizedLearning:
    """Trains a growing prefix of ``model`` without back-propagation through it, and the rest with the user's optimizer.

    ::

        local = LocalizedLearning(model, optimizer, epochs=90)
        for epoch in range(90):
            for x, y in loader:
                loss = criterion(model(x), y)           # rule="hebbian": layers of the prefix update themselves here
                optimizer.zero_grad(set_to_none=True)
                loss.backward()                         # stops at the transition layer
                optimizer.step()
            local.step(epoch_loss)                      # the boundary of the next epoch

    All layers start with SGD. After each epoch the schedule may move the boundary ``T``: ``layers[T]``, the transition layer,
    and all after it go on with SGD; every parameter first used before it is frozen for the optimizer (see
    :class:`PrefixFreeze`), but for the mini-batches that ``refresh`` chooses. In the others ``layers[:T]`` stay as they are or,
    with ``rule="hebbian"``, learn locally by ``W += sign * lr * D / ||D||_2`` (paper, equations 3 and 4).

    Layers are the convolution and linear modules with an unmodified forward and a weight of their own, in the order in which
    the first training forward calls them; whatever else there is, is named in one warning. They act only in training mode
    with gradients enabled. See :class:`HebbianUpdater` for when the write is deferred. Parameters that the user freezes stay
    frozen, see :meth:`keep_frozen`.

    Args:
        model: the network, on its device, or a :class:`localsgd_ext.distributed.ReplicatedModel` of it, for several processes;
            not wrapped in ``nn.DataParallel``, ``DistributedDataParallel`` or FSDP.
        optimizer: the optimizer (or several) of the whole model, or ``None``. Its parameter groups are left alone; the state of
            parameters that get frozen is dropped.
        epochs: length of the run, ``E_max`` of equation 2.
        preset: what is taken for the arguments that are not given. ``None`` (or ``"default"``): ``rule="frozen"``,
            ``schedule="dynamic"``, ``l_max=0.75``, ``min_loss_drop=0.1``, ``refresh=None`` (``lr=0.0001``, should the rule be
            Hebbian).
            ``"refresh"``: the same with ``schedule="linear"``, ``l_max=0.9``, ``refresh=4``.
            ``"paper"``: LoCal+SGD as printed, ``rule="hebbian"``, ``schedule="dynamic"``, ``l_max=0.75``, ``min_loss_drop=0``,
            ``refresh=None``, ``lr=0.01``. With the Hebbian rule :meth:`step` needs the loss.
        schedule: ``"dynamic"`` (Algorithm 1), ``"quadratic"``, ``"linear"``, ``"exponential"`` (static schedules), or a
            new :class:`ModeSelection`, beside which none of the next four arguments may be given: it holds them itself.
        alpha, t_shift: of the dynamic schedule, see :class:`DynamicModeSelection` (``None``: 0.95 and ``"auto"``).
        l_max, min_loss_drop: see :class:`ModeSelection`.
        rule: ``"hebbian"``, or ``"frozen"``: the same boundary, no local updates (with ``refresh=None`` the prefix does not
            learn at all). With ``"frozen"`` what belongs to the updates has no effect; given without a rule it is refused.
        lr: local learning rate, a float or a callable of the epoch.
        lr_decay, lr_decay_every: a float ``lr`` is divided by ``lr_decay`` every so many epochs from the start of training.
        supervision: ``"absolute"`` or ``"toggle"`` (Algorithm 2), a new :class:`WeakSupervision`, or ``None`` for none. ``"auto"``:
            ``"absolute"`` for the Hebbian rule; without it there is no sign to set.
        normalize, activation, momentum, sample, algorithm: see :class:`HebbianUpdater`.
        refresh: one in every so many mini-batches back-propagates through the whole network, and its optimizer step moves the
            prefix too, which makes no local update then; an int, a callable of the epoch, or ``None`` for never (``"auto"``:
            the preset's). A mini-batch ends when every optimizer has made its step; their state for the prefix is kept. One that
            ``GradScaler`` leaves out is none, which a fused optimizer waits for the device to find out.
        bn_stats: ``"update"``, ``"freeze"`` or, with ``rule="frozen"``, ``"fold"``, see :class:`PrefixFreeze`.
        nan_policy: what a mini-batch with NaN or infinity in its data, activations or loss may do. Local weights never take it
            up. ``"report"``: it goes its way, as in plain PyTorch, and :meth:`step` warns of every layer with skipped updates,
            running statistics or parameters that are not finite. ``"skip"``: neither statistics nor the optimizer take it up
            either (:class:`NonFiniteGuard`), which :meth:`step` counts and reports (steps that ``GradScaler`` leaves out are
            its own, and not counted); the optimizer waits for the device in every step. ``"raise"``: :meth:`step` raises instead
            of warning, before it changes anything.
        include, skip: names or regular expressions (matched in full) of the modules that may, may not, be layers.
        on_boundary_move: called as ``on_boundary_move(old, new)`` after the boundary has moved.
    Raises:
        ValueError, TypeError: an argument out of its range, a model or optimizer that cannot be supported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        *,
        epochs: int,
        preset: str | None = None,
        schedule: str | ModeSelection | None = None,
        alpha: float | None = None,
        l_max: float | None = None,
        t_shift: int | float | str | None = None,
        min_loss_drop: float | None = None,
        rule: str | None = None,
        lr: float | Callable[[int], float] | None = None,
        lr_decay: float = 2.0,
        lr_decay_every: int = 30,
        supervision: str | WeakSupervision | None = AUTO,
        normalize: bool = True,
        activation: Activation | None = None,
        momentum: float = 0.0,
        sample: float = 1.0,
        refresh: Every | str | None = AUTO,
        bn_stats: str = "update",
        nan_policy: str = "report",
        include: Patterns = None,
        skip: Patterns = None,
        algorithm: str = "auto",
        on_boundary_move: Callable[[int, int], None] | None = None,
    ) -> None:
        given_model = model
        model, self.replicas = unwrap(model)
        refuse_wrappers(model)
        if Owner.of(model) is not None:  # a notebook cell run twice
            raise ValueError(
                "model must not be under another LocalizedLearning: call remove() on that one first (which "
                f"model.{Owner.NAME}.owner is, too)"
            )
        choices = choose(
            epochs=epochs,
            preset=preset,
            schedule=schedule,
            alpha=alpha,
            l_max=l_max,
            t_shift=t_shift,
            min_loss_drop=min_loss_drop,
            rule=rule,
            lr=lr,
            lr_decay=lr_decay,
            lr_decay_every=lr_decay_every,
            supervision=supervision,
            normalize=normalize,
            activation=activation,
            momentum=momentum,
            sample=sample,
            algorithm=algorithm,
            refresh=refresh,
            bn_stats=bn_stats,
            on_boundary_move=on_boundary_move,
        )
        self.model = model
        self.epochs = epochs
        self.rule = choices.rule
        self.epoch = 0
        """Index of the present epoch."""
        self.on_boundary_move = on_boundary_move
        self.schedule = choices.schedule
        self.supervision = choices.supervision
        self._rate = choices.rate
        self._optimizers = as_optimizers(optimizer, model)
        if choices.refresh is not None:
            every = Refresh(choices.refresh)
            if not self._optimizers:
                raise ValueError(
                    f"refresh={choices.refresh} needs the optimizer, whose steps it counts, got optimizer=None (refresh=None does without)"
                )
        self._bn_stats = bn_stats
        self._include, self._skip = include, skip
        self._plan: ExecutionPlan | None = None
        self._freeze: PrefixFreeze | None = None
        self._epoch_start = UpdateNorm()
        selected = select_names(model, include, skip)
        if not selected:
            raise ValueError(f"include and skip must leave a layer, got include={include!r} and skip={skip!r}")
        self._updater: HebbianUpdater | None = None
        if self.rule == "hebbian":
            self._updater = HebbianUpdater(
                given_model,
                selected,
                lr=self.current_lr,
                normalize=normalize,
                activation=activation,
                momentum=momentum,
                sample=choices.sample,
                algorithm=algorithm,
            )
        try:
            self._guard = NonFiniteGuard(model, self._optimizers, nan_policy)
        except BaseException:
            if self._updater is not None:
                self._updater.remove()
            raise
        self._refresher: Refresher | None = None
        if choices.refresh is not None:
            self._refresher = Refresher(
                every, self._optimizers, self._updater, epoch=lambda: self.epoch, fewer=self._enable_local_layers
            )
        self._report = EpochReport(self._guard, self._updater, self.replicas)
        self._said_waiting = False
        self._removed = False
        self._loads = 0  # states loaded so far
        self._kept = 0  # calls of keep_frozen that stopped something
        self._first_forward = FirstForward(model, self.replicas, self._adopt, include=include, skip=skip)
        self._first_forward.watch()
        Owner(self).put_on(model)

    # ---------------------------------------------------------------- what can be asked

    @property
    def plan(self) -> ExecutionPlan:
        """The layers in execution order.

        Raises:
            RuntimeError: there was no training forward yet.
        """
        if self._plan is None:
            raise RuntimeError(NOT_TRACED)
        return self._plan

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in execution order; see :attr:`plan` for errors."""
        return self.plan.layers

    @property
    def num_layers(self) -> int:
        """``L``, the number of layers."""
        return len(self.plan)

    @property
    def boundary(self) -> int:
        """``T``, the index of the transition layer: ``layers[:T]`` learn locally."""
        return self._freeze.boundary if self._freeze is not None else 0

    @property
    def local_layers(self) -> tuple[str, ...]:
        """Names of the layers that learn locally (with ``rule="frozen"``: not at all), but for those whose weight the user froze.

        The same while a refresh has the prefix open, when none of them makes a local update.
        """
        if self._freeze is None:
            return ()
        frozen = set(self._freeze.frozen)
        return tuple(name for name in self.plan.layers[: self.boundary] if f"{name}.weight" in frozen)

    @property
    def sign(self) -> int:
        """Direction of the local updates in the present epoch: +1 or -1 (Algorithm 2)."""
        return self.supervision.sign if self.supervision is not None else 1

    @property
    def current_lr(self) -> float:
        """Local learning rate of the present epoch, without the sign."""
        return self._rate.at(self.epoch)

    @property
    def refreshing(self) -> bool:
        """Whether the mini-batch that comes next back-propagates through the prefix too."""
        return self._freeze is not None and self._freeze.is_open

    @property
    def skipped(self) -> dict[str, int]:
        """Layer name to the updates skipped in the present epoch (``||D||_2`` zero or not finite). Waits for the device."""
        return self._updater.skipped() if self._updater is not None else {}

    @property
    def kept_statistics(self) -> dict[str, int]:
        """Normalisation layer to how often ``nan_policy="skip"`` put its statistics back in the present epoch. Waits for the
        device."""
        return self._guard.kept_statistics()

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that ``nan_policy="skip"`` left out in the present epoch."""
        return self._guard.skipped_steps

    # ---------------------------------------------------------------- the run

    def trace(self, *example_args: Any, **example_kwargs: Any) -> ExecutionPlan:
        """Find the order of the layers now, with one training forward that changes nothing, instead of in the first one.

        Raises:
            RuntimeError: :meth:`remove` was called.
        """
        if self._removed:
            raise RuntimeError("trace() was called after remove()")
        if self._plan is None:
            self._adopt(self._first_forward.trace(example_args, example_kwargs))
        return self.plan

    def step(self, epoch_loss: float | Tensor | None = None) -> None:
        """End an epoch: decide the boundary, the sign and the local learning rate of the next one.

        With a ``ReplicatedModel`` all processes must call it; each takes the mean of the losses that they give, and the same
        decisions. One process may give it for all.

        Args:
            epoch_loss: mean training loss of the epoch, a float or a tensor of one element. Weak supervision needs it, and
                ``min_loss_drop`` does nothing without it.
        Raises:
            RuntimeError: no training forward was seen yet, or :meth:`remove` was called; the boundary would move and the
                processes' replicas differ, in which case nothing has changed.
            ValueError: ``epoch_loss`` is missing or has more than one element, or a callable ``lr`` or schedule answers what cannot
                be; with several processes, one of them refused its loss. Nothing has changed then.
            TypeError: ``epoch_loss`` or one of these answers is no number; nor then.
            FloatingPointError: with ``nan_policy="raise"``, a loss, parameters or running statistics that are not finite.
        """
        if self._removed:
            raise RuntimeError("step() was called after remove()")
        freeze = self._prefix()
        wrong: Exception | None = None
        mine = loss = None
        try:
            mine = loss = None if epoch_loss is None else number("epoch_loss", epoch_loss)
        except (TypeError, ValueError) as error:
            if self.replicas is None:
                raise
            wrong = error
        norm = self._epoch_start.norm(self._transition_weight()) if self.schedule.needs_update_norm else None
        if self.replicas is not None:
            loss, norm, refusing = self.replicas.agree(loss, norm, refused=wrong is not None)
            if wrong is not None:
                raise wrong
            if refusing:  # or this one would wait for them
                raise ValueError(f"epoch_loss was refused on rank {', '.join(map(str, refusing))}, whose error says why")
        if loss is None and self.supervision is not None:  # on no process: all of them raise, or the others would wait for one
            raise ValueError(
                "epoch_loss must be the epoch's mean training loss, got None (it sets the sign; supervision=None does without)"
            )
        # Weak supervision warns of a loss that is not finite by itself.
        unreported = self.supervision is None or self._guard.policy == "raise"
        self._report.report(self.epoch, freeze.poisoned_norms(), mine if unreported else None)
        # A user's callable may raise: nothing has changed yet.
        if self._updater is not None:
            self._rate.at(self.epoch + 1)
        told = {"loss": loss} if self.schedule.takes_loss else {}
        before = self.schedule.state_dict()
        old, new = freeze.boundary, self.schedule.step(norm, **told)
        if self.replicas is not None and old != new:
            try:
                self.replicas.check(self)  # whatever drifted would hardly be found later
            except BaseException:
                self.schedule.load_state_dict(before)
                raise
        if self.supervision is not None and loss is not None:
            self.supervision.step(loss)
        self.epoch += 1
        if self._updater is not None:
            self._updater.reset_counters()
        self._guard.reset()
        self._apply_boundary(new)
        if self.on_boundary_move is not None and old != new:
            self.on_boundary_move(old, new)
        if self.epoch == self.epochs + 1:
            warnings.warn(
                f"step() ends an epoch and was called more than epochs={self.epochs} times: call it once in each",
                UserWarning,
                stacklevel=2,
            )
        # After the first epoch, whose loss cannot have fallen yet, there is nothing to say.
        if self.schedule.waiting is not None and self.epoch > 1 and not self._said_waiting:
            self._said_waiting = True
            warnings.warn(f"the boundary stays at 0: {self.schedule.waiting}", UserWarning, stacklevel=2)

    def keep_frozen(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze parameters of the model for good: neither a refresh nor a boundary that moves back nor :meth:`remove` thaws them.

        The same as ``requires_grad_(False)``, which does for what learns by SGD or is open to a refresh (:attr:`refreshing`), but
        leaves no trace where the boundary has frozen a parameter already. A layer whose weight is frozen makes no local updates
        either. Call it between mini-batches. It is no part of :meth:`state_dict`, as ``requires_grad`` is none of the model's: when
        resuming say it again, before or after :meth:`load_state_dict`. With a ``ReplicatedModel`` all processes must call it.

        Raises:
            TypeError: something that is not several parameters.
            ValueError: one that is not the model's.
        """
        wanted = "parameters must be an iterable of torch.nn.Parameter"
        if isinstance(parameters, Tensor):  # it is an iterable, of its rows
            raise TypeError(f"{wanted}, got a single {type(parameters).__name__}: put it in a list")
        if not isinstance(parameters, Iterable):
            raise TypeError(f"{wanted}, got {type(parameters).__name__}")
        several = tuple(parameters)
        for each in several:
            if not isinstance(each, nn.Parameter):
                raise TypeError(f"{wanted}, got {type(each).__name__} in it")
        if not set(several) <= set(self.model.parameters()):
            raise ValueError("parameters must be the model's, got some that are not")
        self._kept += any(parameter.requires_grad for parameter in several)
        for parameter in several:
            parameter.requires_grad_(False)
            parameter.grad = None
        if self._freeze is not None:
            self._freeze.forget(several)
            self._enable_local_layers()

    def replicated_state(self) -> Iterator[tuple[str, Any]]:
        """Name and value of everything beside the model that must be the same on all processes of a ``ReplicatedModel``."""
        yield from (("epoch", self.epoch), ("boundary", self.boundary), ("sign", self.sign), ("local lr", self.current_lr))
        yield "parameters frozen by the boundary", sorted(self._freeze.frozen) if self._freeze is not None else []
        if self._refresher is not None:
            yield "mini-batches since the last refresh", self._refresher.refresh.since
        if self._updater is not None:
            for name, velocity in self._updater.state_dict()["momentum"].items():
                yield f"local momentum of {name}", velocity
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self._optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{key} of {names.get(parameter, 'a parameter of no layer')}", value

    def remove(self) -> None:
        """Take the hooks off and give the frozen parameters back to SGD; deferred updates are made first."""
        self._removed = True
        Owner.take_off(self.model)
        self._first_forward.ignore()
        self._first_forward.abandon()
        if self._refresher is not None:
            self._refresher.remove()
        self._guard.remove()
        if self._updater is not None:
            self._updater.remove()
        if self._freeze is not None:
            self._freeze.remove()

    def __repr__(self) -> str:
        depth = f" of {len(self._plan)} layers" if self._plan is not None else ""
        where = f"boundary={self.boundary}{depth}, epoch={self.epoch} of {self.epochs}"
        return f"{type(self).__name__}(rule={self.rule!r}, {where}, schedule={self.schedule!r})"

    def __enter__(self) -> LocalizedLearning:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.remove()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, beside the model's and the optimizer's own states.

        Holds tensors, numbers, strings and containers of them: loads with ``torch.load(weights_only=True)``. Deferred
        updates are made first, so take it before the model's.
        """
        return {
            "format": STATE_FORMAT,
            "rule": self.rule,
            "epoch": self.epoch,
            "plan": None if self._plan is None else self._plan.state_dict(),
            "schedule": self.schedule.state_dict(),
            "supervision": None if self.supervision is None else self.supervision.state_dict(),
            "updater": None if self._updater is None else self._updater.state_dict(),
            "epoch_start": self._epoch_start.state(),
            "refresh": None if self._refresher is None else self._refresher.refresh.state_dict(),
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after the model's (and before or after the optimizer's) state.

        Freezes the prefix again. Hyper-parameters of the schedule come from the state; the learning rate, its decay and the
        rule's options are the constructor's.

        Raises:
            ValueError: the state is of another network (the first difference is named), format, rule, schedule or number of
                epochs, or of a run with a refresh where there is none here.
        """
        plan = checked_plan(
            state,
            self.model,
            rule=self.rule,
            epochs=self.epochs,
            supervised=self.supervision is not None,
            refreshed=self._refresher is not None,
            known=self._plan,
            kept_frozen=self._kept_frozen(),
            include=self._include,
            skip=self._skip,
        )
        self._loads += 1
        self.schedule.load_state_dict(state["schedule"])  # may refuse the state, so before anything is changed
        if self._updater is not None:
            self._updater.discard()  # deferred updates of the weights that the loaded ones replace
        if self.supervision is not None and state["supervision"] is not None:
            self.supervision.load_state_dict(state["supervision"])
        if self._refresher is not None and state.get("refresh") is not None:
            self._refresher.refresh.load_state_dict(state["refresh"])
        if "guard" in state:  # not in states from before there was `nan_policy`
            self._guard.load_state_dict(state["guard"])
        self.epoch = state["epoch"]
        if plan is None and self._plan is not None:  # back to before the first training forward, which is traced anew
            self._prefix().remove()
            if self._updater is not None:
                self._updater.enable(())
            self._plan = None
            self._set_freeze(None)
            self._epoch_start.forget()
            self._first_forward.watch()
        if plan is not None:
            if plan.foldable.pairs is None and self._plan is not None:  # of an older version; seen here meanwhile
                plan = replace(plan, foldable=self._plan.foldable)
            if self._freeze is not None and plan.layers != self._freeze.plan.layers:  # one had layers frozen when it was made
                self._freeze.remove()
                self._set_freeze(None)
            self._know(plan)
            self._set_freeze(self._freeze or self._freeze_for(plan))
            self._apply_boundary(self.schedule.boundary)
            self._epoch_start.load(state["epoch_start"], self._transition_weight().device)
        if self._updater is not None:
            self._updater.load_state_dict(state["updater"])

    # ---------------------------------------------------------------- inside

    def _adopt(self, plan: ExecutionPlan) -> None:
        report_left_out(plan)
        block = min(recurring_block_size(self.model, plan), max(1, math.floor(self.schedule.l_max * len(plan))))
        self.schedule.bind(len(plan), self.epochs, block)
        reason = self.schedule.never_moves()
        if reason is not None:
            what = "learn locally" if self.rule == "hebbian" else "be frozen"
            warnings.warn(f"no layer will ever {what} in this run: {reason}", UserWarning, stacklevel=2)
        self._know(plan)
        self._set_freeze(self._freeze_for(plan))
        if self._updater is not None:
            self._updater.reset_counters()  # the forward that was traced had no local layers
        self._apply_boundary(self.schedule.boundary)

    def _know(self, plan: ExecutionPlan) -> None:
        self._plan = plan
        self._first_forward.ignore()
        owners = {name.rpartition(".")[0]: position for name, position in plan.parameters.items()}
        self._guard.order = {**owners, **plan.parameters, **plan.norms}

    def _kept_frozen(self) -> set[str]:
        """Names of the parameters that the user has frozen."""
        by_the_boundary = set(self._freeze.frozen) if self._freeze is not None else set()
        return {n for n, p in self.model.named_parameters() if not p.requires_grad and n not in by_the_boundary}

    def _freeze_for(self, plan: ExecutionPlan) -> PrefixFreeze:
        return PrefixFreeze(
            self.model,
            plan,
            optimizers=self._optimizers,
            bn_stats=self._bn_stats,
            keep_state=self._refresher is not None,
        )

    def _set_freeze(self, freeze: PrefixFreeze | None) -> None:
        self._freeze = freeze
        if self._refresher is not None:
            self._refresher.freeze = freeze

    def _apply_boundary(self, boundary: int) -> None:
        freeze = self._prefix()
        if self.replicas is not None and boundary != freeze.boundary:
            self.replicas.rewrap()
        freeze.set_boundary(boundary)
        self._enable_local_layers()
        if self._updater is not None:
            self._updater.set_lr(self.sign * self.current_lr)
        if self.schedule.needs_update_norm:
            self._epoch_start.begin(self._transition_weight())
        if self._refresher is not None:
            self._refresher.open_if_due()

    def _enable_local_layers(self) -> None:
        if self._updater is not None:
            repeated = [name for name, calls in zip(self.plan.layers, self.plan.calls, strict=True) if calls > 1]
            self._updater.enable(self.local_layers, deferred=repeated)

    def _transition_weight(self) -> Tensor:
        weight: Tensor = self.model.get_submodule(self.plan.layers[self.boundary]).weight  # type: ignore[assignment]
        return weight

    def _prefix(self) -> PrefixFreeze:
        if self._freeze is None:
            raise RuntimeError(NOT_TRACED)
        return self._freeze
