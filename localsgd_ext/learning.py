"""Localized learning inside the user's own training loop (LoCal+SGD)."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from numbers import Integral, Real
from types import NoneType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .freezing import BN_STATS, PrefixFreeze, as_optimizers
from .hooks import CallHook, Hook, under_transform
from .layers import ExecutionPlan, Patterns, Tracer, recurring_block_size, report_left_out, select_names, trace_layers
from .nonfinite import NonFiniteGuard
from .refresh import Every, Refresh
from .sampling import check_sample
from .selection import DynamicModeSelection, ModeSelection, StaticModeSelection
from .supervision import WeakSupervision
from .updater import NO_TRANSFORM, Activation, HebbianUpdater
from .wrappers import refuse_sharded, refuse_wrappers, unwrap

RULES = ("hebbian", "frozen")
AUTO = "auto"
PRESETS: dict[str, dict[str, Any]] = {
    # What keeps most of SGD's accuracy for its cost. The Hebbian step is not in it: it was not seen to help. Its normalised step
    # has the length lr whatever the size of the weight; 0.01, the paper's, overwrites trained filters on networks of ordinary
    # width, 1e-4 stays within reach of freezing.
    "default": {"rule": "frozen", "schedule": "linear", "l_max": 0.9, "refresh": 4, "lr": 1e-4},
    "paper": {"rule": "hebbian", "schedule": "dynamic", "l_max": 0.75, "refresh": None, "lr": 0.01},
}
"""What is taken for arguments that are not given; for ``preset=None`` the first."""
STATE_FORMAT = 1
NOT_TRACED = "the order of the layers is not known before the first training forward: run one, or call trace()"


class LocalizedLearning:
    """Trains a growing prefix of ``model`` without back-propagation through it, and the rest with the user's optimizer.

    ::

        local = LocalizedLearning(model, optimizer, epochs=90)
        for epoch in range(90):
            for x, y in loader:
                loss = criterion(model(x), y)           # rule="hebbian": layers of the prefix update themselves here
                optimizer.zero_grad(set_to_none=True)
                loss.backward()                         # stops at the transition layer; one in 4 goes through the prefix too
                optimizer.step()
            local.step(epoch_loss)                      # the boundary of the next epoch

    All layers start with SGD. After each epoch the schedule may move the boundary ``T``: ``layers[T]``, the transition layer,
    and all after it go on with SGD; every parameter first used before it is frozen for the optimizer (see
    :class:`PrefixFreeze`), but for the mini-batches that ``refresh`` chooses. In the others ``layers[:T]`` stay as they are or,
    with ``rule="hebbian"``, learn locally by ``W += sign * lr * D / ||D||_2`` (paper, equations 3 and 4).

    Layers are the convolution and linear modules with an unmodified forward and a weight of their own, in the order in which
    the first training forward calls them; whatever else there is, is named in one warning. They act only in training mode
    with gradients enabled. See :class:`HebbianUpdater` for when the write is deferred.

    Args:
        model: the network, on its device, or a :class:`localsgd_ext.distributed.ReplicatedModel` of it, for several processes;
            not wrapped in ``nn.DataParallel``, ``DistributedDataParallel`` or FSDP.
        optimizer: the optimizer (or several) of the whole model, or ``None``. Its parameter groups are left alone; the state of
            parameters that get frozen is dropped.
        epochs: length of the run, ``E_max`` of equation 2.
        preset: what is taken for the arguments that are not given. ``None``: ``rule="frozen"``, ``schedule="linear"``,
            ``l_max=0.9``, ``refresh=4``, what was measured to be worth its cost (``lr=0.0001``, should the rule be Hebbian).
            ``"paper"``: LoCal+SGD as printed, ``rule="hebbian"``, ``schedule="dynamic"``, ``l_max=0.75``, ``refresh=None``,
            ``lr=0.01``.
        schedule: ``"dynamic"`` (Algorithm 1), ``"quadratic"``, ``"linear"``, ``"exponential"`` (static schedules), or a
            :class:`ModeSelection`, which then holds ``alpha``, ``l_max`` and ``t_shift`` itself.
        alpha, l_max, t_shift: see :class:`DynamicModeSelection`.
        rule: ``"hebbian"``, or ``"frozen"``: the same boundary, no local updates (with ``refresh=None`` the prefix does not
            learn at all: the freezing baseline).
        lr: local learning rate, a float or a callable of the epoch.
        lr_decay, lr_decay_every: a float ``lr`` is divided by ``lr_decay`` every so many epochs from the start of training.
        supervision: ``"absolute"`` or ``"toggle"`` (Algorithm 2), a :class:`WeakSupervision`, or ``None`` for none. ``"auto"``:
            ``"absolute"`` for the Hebbian rule; without it there is no sign to set.
        normalize, activation, momentum, sample, algorithm: see :class:`HebbianUpdater`.
        refresh: one in every so many mini-batches back-propagates through the whole network, and its optimizer step moves the
            prefix too, which makes no local update then; an int, a callable of the epoch, or ``None`` for never (``"auto"``:
            the preset's). A mini-batch ends when every optimizer has made its step; their state for the prefix is kept.
        bn_stats: ``"update"`` or ``"freeze"``, see :class:`PrefixFreeze`.
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
        alpha: float = 0.95,
        l_max: float | None = None,
        t_shift: int | float | str = "auto",
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
        given: tuple[tuple[str, Any, Any, str], ...] = (
            ("epochs", epochs, Integral, "an int"),
            ("lr_decay_every", lr_decay_every, Integral, "an int"),
            ("lr", lr, (NoneType, Real, Callable), "a number, a callable of the epoch or None"),
            ("supervision", supervision, (NoneType, str, WeakSupervision), "a name, a WeakSupervision or None"),
            ("on_boundary_move", on_boundary_move, (NoneType, Callable), "callable or None"),
        )
        for name, value, types, wanted in given:
            if not isinstance(value, types):
                raise TypeError(f"{name} must be {wanted}, got {value!r}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset must be None or one of {', '.join(PRESETS)}, got {preset!r}")
        chosen = PRESETS[preset or "default"]
        rule = chosen["rule"] if rule is None else rule
        refresh = chosen["refresh"] if refresh == AUTO else refresh
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if bn_stats not in BN_STATS:
            raise ValueError(f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}")
        if not lr_decay >= 1:  # so that NaN is refused
            raise ValueError(f"lr_decay must be at least 1, got {lr_decay}")
        if lr_decay_every < 1:
            raise ValueError(f"lr_decay_every must be at least 1, got {lr_decay_every}")
        sample = check_sample(sample)
        lr = chosen["lr"] if lr is None else lr
        if not callable(lr) and not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and at least 0, got {lr}")
        self.model = model
        self.epochs = epochs
        self.rule = rule
        self.epoch = 0
        """Index of the present epoch."""
        self.on_boundary_move = on_boundary_move
        self.schedule = _schedule(
            chosen["schedule"] if schedule is None else schedule,
            alpha=alpha,
            l_max=chosen["l_max"] if l_max is None else l_max,
            t_shift=t_shift,
        )
        if supervision == AUTO:
            supervision = "absolute" if rule == "hebbian" else None
        self.supervision = WeakSupervision(supervision) if isinstance(supervision, str) else supervision
        self._lr, self._lr_decay, self._lr_decay_every = lr, lr_decay, lr_decay_every
        self._optimizers = as_optimizers(optimizer)
        self._refresh = None if refresh is None else Refresh(refresh)  # type: ignore[arg-type]  # refuses other strings
        if refresh is not None and not self._optimizers:
            raise ValueError(
                f"refresh={refresh} needs the optimizer, whose steps it counts, got optimizer=None (refresh=None does without)"
            )
        self._bn_stats = bn_stats
        self._guard = NonFiniteGuard(model, self._optimizers, nan_policy)
        self._include, self._skip = include, skip
        self._plan: ExecutionPlan | None = None
        self._freeze: PrefixFreeze | None = None
        self._stop_tracing: Callable[[], None] | None = None
        self._tracer: Tracer | None = None
        self._epoch_start: Tensor | None = None  # the transition layer's weight at the start of the epoch
        self._warned_silent = False
        self._stepped: set[Optimizer] = set()  # in the present mini-batch
        self._refreshed: set[Optimizer] = set()  # stepped with gradients of the prefix since it was opened
        self._late: set[Optimizer] = set()  # yet to step with the prefix's gradients, though it is closed again
        selected = select_names(model, include, skip)
        self._updater: HebbianUpdater | None = None
        if rule == "hebbian":
            self._updater = HebbianUpdater(
                given_model,
                selected,
                lr=self.current_lr,
                normalize=normalize,
                activation=activation,
                momentum=momentum,
                sample=sample,
                algorithm=algorithm,
            )
        self._removed = False
        self._loads = 0  # states loaded so far
        self._handles: list[Any] = []
        if self._refresh is not None:
            self._handles += [each.register_step_post_hook(self._after_optimizer_step) for each in self._optimizers]
        self._tracing_handles: list[Any] = []
        self._await_forward()

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
        """Names of the layers that learn locally (with ``rule="frozen"``: not at all)."""
        return self.plan.layers[: self.boundary] if self._plan is not None else ()

    @property
    def sign(self) -> int:
        """Direction of the local updates in the present epoch: +1 or -1 (Algorithm 2)."""
        return self.supervision.sign if self.supervision is not None else 1

    @property
    def current_lr(self) -> float:
        """Local learning rate of the present epoch, without the sign."""
        if callable(self._lr):
            return float(self._lr(self.epoch))
        return float(self._lr / self._lr_decay ** (self.epoch // self._lr_decay_every))

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
        """Find the order of the layers now, with one training forward that changes nothing, instead of in the first one."""
        if self._plan is None:
            self._stop_tracing = lambda: None  # this forward is watched by trace_layers, not by our own hooks
            try:
                plan = trace_layers(self.model, *example_args, include=self._include, skip=self._skip, **example_kwargs)
            finally:
                self._end_tracing()
            self._adopt(plan)
        return self.plan

    def step(self, epoch_loss: float | Tensor | None = None) -> None:
        """End an epoch: decide the boundary, the sign and the local learning rate of the next one.

        With a ``ReplicatedModel`` all processes must call it; each takes the mean of their losses and the same decisions.

        Args:
            epoch_loss: mean training loss of the epoch, a float or a tensor of one element; needed for weak supervision.
        Raises:
            RuntimeError: no training forward was seen yet, or :meth:`remove` was called; the boundary would move and the
                processes' replicas differ.
            ValueError: ``epoch_loss`` is missing or has more than one element.
            FloatingPointError: with ``nan_policy="raise"``, a loss, parameters or running statistics that are not finite.
        """
        if self._removed:
            raise RuntimeError("step() was called after remove()")
        freeze = self._prefix()
        if epoch_loss is None and self.supervision is not None:
            raise ValueError(
                "epoch_loss must be the epoch's mean training loss, got None (it sets the sign; supervision=None does without)"
            )
        if isinstance(epoch_loss, Tensor) and epoch_loss.numel() != 1:
            raise ValueError(f"epoch_loss must have one element, got shape {tuple(epoch_loss.shape)}")
        self._report_trouble(freeze, None if epoch_loss is None else float(torch.as_tensor(epoch_loss).detach()))
        norm = self._update_norm() if self.schedule.needs_update_norm else None
        loss = None if epoch_loss is None else float(torch.as_tensor(epoch_loss).detach())
        if self.replicas is not None:
            loss, norm = self.replicas.agree(loss, norm)
        if self.supervision is not None and loss is not None:
            self.supervision.step(loss)
        self.epoch += 1
        old, new = freeze.boundary, self.schedule.step(norm)
        if self.replicas is not None and old != new:
            self.replicas.check(self)  # whatever drifted would hardly be found later
        if self._updater is not None:
            self._updater.reset_counters()
        self._guard.reset()
        self._apply_boundary(new)
        if self.on_boundary_move is not None and old != new:
            self.on_boundary_move(old, new)

    def replicated_state(self) -> Iterator[tuple[str, Any]]:
        """Name and value of everything beside the model that must be the same on all processes of a ``ReplicatedModel``."""
        yield from (("epoch", self.epoch), ("boundary", self.boundary), ("sign", self.sign), ("local lr", self.current_lr))
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
        for handle in (*self._handles, *self._tracing_handles):
            handle.remove()
        self._handles, self._tracing_handles = [], []
        self._end_tracing()
        self._guard.remove()
        if self._updater is not None:
            self._updater.remove()
        if self._freeze is not None:
            self._freeze.remove()

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
            "epoch_start": None if self._epoch_start is None else self._epoch_start.detach().clone(),
            "refresh": None if self._refresh is None else self._refresh.state_dict(),
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after the model's (and before or after the optimizer's) state.

        Freezes the prefix again. Hyper-parameters of the schedule come from the state; the learning rate, its decay and the
        rule's options are the constructor's.

        Raises:
            ValueError: the state is of another network (the first difference is named), format, rule or schedule.
        """
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"state must have format {STATE_FORMAT}, got {state.get('format')!r}")
        if state["rule"] != self.rule:
            raise ValueError(f"the state is of rule {state['rule']!r}, this is {self.rule!r}")
        if (state["supervision"] is None) != (self.supervision is None):
            raise ValueError("the state and this object differ in whether there is weak supervision")
        plan = None if state["plan"] is None else ExecutionPlan.from_state_dict(state["plan"], self.model)
        if plan is not None and self._plan is not None and plan.layers != self._plan.layers:
            pairs = zip_longest(self._plan.layers, plan.layers)
            here, there = next((here, there) for here, there in pairs if here != there)
            raise ValueError(f"the state is of another network: its layer {there!r} stands where this one has {here!r}")
        unknown = sorted(set(plan.layers) - select_names(self.model, self._include, self._skip)) if plan is not None else []
        if unknown:
            raise ValueError(f"the state's layer {unknown[0]!r} is excluded here by include or skip")
        self._loads += 1
        self.schedule.load_state_dict(state["schedule"])  # may refuse the state, so before anything is changed
        if self._updater is not None:
            self._updater.discard()  # deferred updates of the weights that the loaded ones replace
        if self.supervision is not None:
            self.supervision.load_state_dict(state["supervision"])
        if self._refresh is not None and state.get("refresh") is not None:
            self._refresh.load_state_dict(state["refresh"])
        if "guard" in state:  # not in states from before there was `nan_policy`
            self._guard.load_state_dict(state["guard"])
        self.epoch = state["epoch"]
        if plan is None and self._plan is not None:  # back to before the first training forward, which is traced anew
            self._prefix().remove()
            if self._updater is not None:
                self._updater.enable(())
            self._plan = self._freeze = self._epoch_start = None
            self._await_forward()
        if plan is not None:
            self._know(plan)
            self._freeze = self._freeze or self._freeze_for(plan)
            self._apply_boundary(self.schedule.boundary)
            weight = self._transition_weight()
            self._epoch_start = None if state["epoch_start"] is None else state["epoch_start"].to(weight.device, copy=True)
        if self._updater is not None:
            self._updater.load_state_dict(state["updater"])

    # ---------------------------------------------------------------- for CUDA graphs

    def _require_capturable(self) -> None:
        """Check that a training step can be captured in a CUDA graph.

        Raises:
            ValueError: an option that decides something on the host in every step.
        """
        if self._updater is not None and self._updater.sample < 1:
            raise ValueError(
                f"sample must be 1 in a CUDA graph, which would see the same slice for ever; got {self._updater.sample}"
            )
        if self._guard.policy == "skip":
            raise ValueError(
                "nan_policy must be 'report' or 'raise' in a CUDA graph, as 'skip' waits for the device in every step"
            )

    def _capture_key(self) -> tuple[Any, ...]:
        """What a captured step holds fast: it must be captured again where this changes."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        settings = tuple(
            tuple((k, id(v) if isinstance(v, Tensor) else v) for k, v in group.items() if k != "params") for group in groups
        )
        return self._plan is None, self.boundary, self.model.training, self._loads, settings

    def _require_written(self) -> None:
        """Check that no update waits for the next forward.

        Raises:
            RuntimeError: one does; its layers are named.
        """
        waiting = self._updater.waiting if self._updater is not None else []
        if waiting:
            raise RuntimeError(
                f"a CUDA graph would lose the deferred updates of {', '.join(waiting)}: layers used several times in a forward, "
                "under activation checkpointing, or with gradients flowing through them"
            )

    def _mini_batch_passed(self) -> None:
        """Count a mini-batch for ``refresh``; done by the optimizers' hooks, but where a graph makes their steps."""
        self._stepped.clear()
        if self._refresh is not None and self.boundary > 0:
            self._refresh.advance(self.epoch)
            self._open_if_due()

    # ---------------------------------------------------------------- inside

    def _await_forward(self) -> None:
        """Watch for the first training forward. These hooks go when it has come: torch.compile need not look at them."""
        self._tracing_handles = [
            self.model.register_forward_pre_hook(CallHook(self._before_forward), prepend=True),
            self.model.register_forward_hook(_AfterForward(self._after_forward), always_call=True),
        ]

    def _before_forward(self, module: nn.Module) -> None:
        if self._plan is None and self._stop_tracing is None and module.training and torch.is_grad_enabled():
            refuse_sharded(module)
            if under_transform() or not all(isinstance(p, nn.Parameter) for p in self.model.parameters()):
                raise RuntimeError(f"the first training forward finds the order of the layers, {NO_TRANSFORM}")
            self._tracer = Tracer(self.model, include=self._include, skip=self._skip)
            self._stop_tracing = self._tracer.start()

    def _after_forward(self, failed: bool) -> None:
        tracer = self._end_tracing()
        if tracer is not None and not failed:
            self._adopt(tracer.plan())
            if self.replicas is not None and self.boundary > 0:  # its wrapper would give them gradients of zero in the backward
                raise RuntimeError(
                    "the schedule starts above 0, and parameters cannot be frozen in the middle of a ReplicatedModel's forward: "
                    "call trace() before the first one"
                )

    def _end_tracing(self) -> Tracer | None:
        tracer, self._tracer = self._tracer, None
        stop, self._stop_tracing = self._stop_tracing, None
        if stop is not None:
            stop()
        return tracer

    def _adopt(self, plan: ExecutionPlan) -> None:
        report_left_out(plan)
        block = min(recurring_block_size(self.model, plan), max(1, math.floor(self.schedule.l_max * len(plan))))
        self.schedule.bind(len(plan), self.epochs, block)
        reason = self.schedule.never_moves()
        if reason is not None:
            warnings.warn(f"no layer will ever learn locally in this run: {reason}", UserWarning, stacklevel=2)
        self._know(plan)
        self._freeze = self._freeze_for(plan)
        if self._updater is not None:
            self._updater.reset_counters()  # the forward that was traced had no local layers
        self._apply_boundary(self.schedule.boundary)

    def _know(self, plan: ExecutionPlan) -> None:
        self._plan = plan
        for handle in self._tracing_handles:
            handle.remove()
        self._tracing_handles = []
        owners = {name.rpartition(".")[0]: position for name, position in plan.parameters.items()}
        self._guard.order = {**owners, **plan.parameters, **plan.norms}

    def _freeze_for(self, plan: ExecutionPlan) -> PrefixFreeze:
        return PrefixFreeze(
            self.model,
            plan,
            optimizers=self._optimizers,
            bn_stats=self._bn_stats,
            keep_state=self._refresh is not None,
        )

    def _after_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in self._late:
            self._late.discard(optimizer)
            self._prefix().drop_gradients(optimizer)
        if self.refreshing and self._prefix().has_gradients(optimizer):
            self._refreshed.add(optimizer)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._mini_batch_passed()

    def _open_if_due(self) -> None:
        """Whether the next mini-batch goes through the prefix."""
        if self._refresh is None:
            return
        due = self.boundary > 0 and self._refresh.due(self.epoch)
        if self.refreshing and not due:
            # If one missed a step, mini-batches seem to end with a step too few: it has yet to use its gradients.
            self._late = set(self._optimizers) - self._refreshed
            self._refreshed.clear()
        self._prefix().set_open(due, keep_gradients_of=self._late)
        if self._updater is not None:
            self._updater.paused = due

    def _apply_boundary(self, boundary: int) -> None:
        freeze = self._prefix()
        if self.replicas is not None and boundary != freeze.boundary:
            self.replicas.rewrap()
        freeze.set_boundary(boundary)
        if self._updater is not None:
            repeated = [name for name, calls in zip(self.plan.layers, self.plan.calls, strict=True) if calls > 1]
            self._updater.enable(self.local_layers, deferred=repeated)
            self._updater.set_lr(self.sign * self.current_lr)
        if self.schedule.needs_update_norm:
            self._epoch_start = self._transition_weight().detach().clone()
        self._open_if_due()

    def _transition_weight(self) -> Tensor:
        weight: Tensor = self.model.get_submodule(self.plan.layers[self.boundary]).weight  # type: ignore[assignment]
        return weight

    def _update_norm(self) -> float:
        """``||W_T(end of epoch) - W_T(start of epoch)||_2`` of the transition layer."""
        weight = self._transition_weight().detach()
        assert self._epoch_start is not None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        change = weight.to(dtype) - self._epoch_start.to(weight.device, dtype)
        return float(torch.linalg.vector_norm(change, dtype=torch.float64))

    def _prefix(self) -> PrefixFreeze:
        if self._freeze is None:
            raise RuntimeError(NOT_TRACED)
        return self._freeze

    def _report_trouble(self, freeze: PrefixFreeze, epoch_loss: float | None) -> None:
        """What went wrong in the epoch, each as one warning that names the layers."""
        raises = self._guard.policy == "raise"
        found = self._guard.findings(freeze.poisoned_norms(), epoch_loss if raises or self.supervision is None else None)
        if raises and self.replicas is not None:  # all processes raise, or the others would wait for this one
            troubled = [str(rank) for rank, (is_so,) in enumerate(self.replicas.gather([float(bool(found))])) if is_so]
            if troubled and not found:
                found = [f"not finite on rank {', '.join(troubled)}"]
        if found and raises:
            raise FloatingPointError(f"epoch {self.epoch}: {'; '.join(found)}")
        skipped = self.skipped
        if skipped:
            named = ", ".join(f"{name} ({count})" for name, count in skipped.items())
            found.append(f"local updates skipped because the correlation was zero or not finite: {named}")
        for message in (*found, *self._guard.kept()):
            warnings.warn(message, UserWarning, stacklevel=3)
        parts = self._updater.parts_only() if self._updater is not None else []
        if parts:
            warnings.warn(
                "the model itself was never called in this epoch, only parts of it, so that the mini-batches could not be told "
                f"apart and all after the first became one local update: {', '.join(parts)}",
                UserWarning,
                stacklevel=3,
            )
        silent = self._updater.silent() if self._updater is not None else []
        if silent and not self._warned_silent:
            self._warned_silent = True
            warnings.warn(
                "local layers that never ran with gradients enabled in this epoch, and so did not learn "
                f"(evaluation mode, torch.no_grad, checkpointing with use_reentrant=True?): {', '.join(silent)}",
                UserWarning,
                stacklevel=3,
            )


class _AfterForward(Hook):
    """Calls ``action(failed)`` after a forward, even one that raised (``always_call``: torch then passes no output)."""

    def __init__(self, action: Callable[[bool], None]) -> None:
        self.action = action

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.action(output is None and sys.exc_info()[0] is not None)


def _schedule(schedule: str | ModeSelection, *, alpha: float, l_max: float, t_shift: int | float | str) -> ModeSelection:
    if isinstance(schedule, ModeSelection):
        return schedule
    if schedule == "dynamic":
        return DynamicModeSelection(alpha=alpha, l_max=l_max, t_shift=t_shift)
    if schedule in StaticModeSelection.KINDS:
        return StaticModeSelection(kind=schedule, l_max=l_max)
    known = ", ".join(("dynamic", *StaticModeSelection.KINDS))
    raise ValueError(f"schedule must be one of {known} or a ModeSelection, got {schedule!r}")
