"""Forward hooks that update layers locally (paper, section 2.1, equations 3 and 4)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import ops
from .hooks import CallHook, in_backward, under_checkpoint, under_transform
from .layer_hook import LayerHook, parameter
from .layers import Patterns, is_plain, select_names
from .local_step import LocalStep, check_lr, check_momentum
from .replicated_sums import ReplicatedSums
from .sampling import check_sample, sampled, sampled_correlation
from .wrappers import refuse_sharded, refuse_wrappers, unwrap

Activation = Callable[[Tensor], Tensor]
NO_TRANSFORM = (
    "which torch.func cannot express: its functions may not write weights; call the model directly, in evaluation mode or under "
    "torch.no_grad(), or remove() localized learning"
)


class HebbianUpdater:
    """Updates layers with ``W += lr * D / ||D||_2`` in every training forward, ``D = correlation(x, z)``.

    A layer is updated right after its own forward, in the forward hook, if it is in training mode and gradients are enabled:
    evaluation and ``torch.no_grad()`` never update. Where the weight is still needed after the forward, the write is
    *deferred*: ``D`` is summed and one normalised step is made at the next forward of ``model`` (or by :meth:`flush`).
    That holds for layers called more than once in a forward, for layers under activation checkpointing and for layers
    through which gradients flow (their output requires grad), which makes non-prefix patterns (section 2.2) work.

    Each training forward of ``model`` itself is one mini-batch (a call of a part of it is none): with gradient accumulation
    every micro-batch makes its own local step.

    Given a :class:`localsgd_ext.distributed.ReplicatedModel`, every ``D`` is summed over its processes and all writes are
    deferred; all processes make the same step, that of one process with the whole batch. What is summed of a layer that the Gram
    form computes may be the Gram matrix ``G`` in the place of ``D = W·G``, whose product is then made once, before the write: ``W``
    and the bias are frozen for the optimizer there, and whoever else changes them in between is warned of, once.

    Args:
        model: the network, or a ``ReplicatedModel`` of it; the hooks go on its convolution and linear modules.
        layers: names or regular expressions of the modules to hook; all with an unmodified forward unless given. None is
            updated before :meth:`enable`.
        lr: signed learning rate; the step's length is ``|lr|`` whatever the size of the weight.
        normalize: ``False`` leaves out the division by ``||D||_2`` (ablation of equation 4).
        activation: ``D = correlation(x, activation(z))``, the post-activation rule of equation 1 (ablation).
        momentum: ``V = momentum * V + D / ||D||_2``, ``W += lr * V`` (ablation of section 2.3).
        sample: the fraction of each mini-batch that ``D`` is made of, in (0, 1]: ``max(1, round(sample * N))`` of ``N`` images,
            at least one, as a slice of ``x`` and ``z`` along their first dimension, which is not copied. The slice is the same
            for all layers and rotates with the training forwards of ``model`` in which layers are enabled
            (:mod:`localsgd_ext.sampling`). ``||D||_2`` is that of the sampled ``D``, so the step's length stays ``|lr|``.
            Unbatched input is used whole. ``torch.compile`` makes one graph for all slices; CUDA graphs are refused.
        algorithm: see :func:`localsgd_ext.ops.hebbian_update_`.
    Raises:
        ValueError: an argument out of its range, a pattern that matches no layer, or a model under another updater.
        TypeError: ``sample`` is not a number; a wrapped or sharded model (``DataParallel``, ``DistributedDataParallel``, FSDP).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Patterns = None,
        *,
        lr: float = 1e-4,
        normalize: bool = True,
        activation: Activation | None = None,
        momentum: float = 0.0,
        sample: float = 1.0,
        algorithm: str = "auto",
    ) -> None:
        check_update(normalize=normalize, activation=activation, momentum=momentum, sample=sample, algorithm=algorithm)
        self._step = LocalStep(lr, normalize=normalize, momentum=momentum)
        model, self.replicas = unwrap(model)
        refuse_wrappers(model)
        if self.replicas is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"local updates are not summed over the {dist.get_world_size()} processes: where they train one model together, "
                "their copies of the prefix drift apart; wrap the model in localsgd_ext.distributed.ReplicatedModel",
                UserWarning,
                stacklevel=2,
            )
        self.model = model
        self.activation = activation
        self.sample = float(sample)
        self.algorithm = algorithm
        self.forwards = 0
        """Training forwards of ``model`` since the last :meth:`reset_counters`, but for those while :attr:`paused`."""
        self.paused = False
        """Whether the enabled layers are left to back-propagation for now."""
        # Since the last reset. It and the hooks' `fired` are only written in a forward: torch.compile does not guard on them.
        self._called = False
        self._forward_id = 0
        self._any_enabled = False
        self._sharding_checked = False
        # Index of the present training forward with layers enabled. A tensor: torch.compile neither guards on it nor bakes it in.
        self._turn = torch.full((), -1, dtype=torch.int64, device="cpu")
        self._pending: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        names = select_names(model, layers, argument="layers")
        update = self._eager(self._update)
        self._hooks = {
            name: LayerHook(self, update, name, modules[name]) for name in modules if name in names and is_plain(modules[name])
        }
        taken = [n for n in self._hooks if any(isinstance(h, LayerHook) for h in modules[n]._forward_hooks.values())]
        if taken:  # a second one (a notebook cell run twice) would double every step
            raise ValueError(f"model must not be under another updater: {taken[0]!r} is; call remove() on that one first")
        self._sums = None if self.replicas is None else ReplicatedSums(self.replicas, self._hooks)
        self._handles = [
            modules[name].register_forward_hook(hook, prepend=True, with_kwargs=True) for name, hook in self._hooks.items()
        ]
        self._handles.append(model.register_forward_pre_hook(CallHook(self._eager(self._begin_forward)), prepend=True))
        if self._sums is not None:
            self._handles.append(model.register_forward_hook(CallHook(self._eager(self._end_forward))))
            before_saving = CallHook(lambda _: self.flush())
            self._handles.append(model.register_state_dict_pre_hook(before_saving))  # type: ignore[no-untyped-call]

    @property
    def lr(self) -> float:
        """The signed learning rate."""
        return self._step.lr

    @property
    def normalize(self) -> bool:
        return self._step.normalize

    @property
    def momentum(self) -> float:
        return self._step.momentum

    @property
    def enabled(self) -> list[str]:
        """Names of the layers that are updated."""
        return [name for name, hook in self._hooks.items() if hook.enabled]

    @property
    def waiting(self) -> list[str]:
        """Names of the layers with a deferred update."""
        return list(self._pending)

    def enable(self, names: Iterable[str], *, deferred: Iterable[str] = ()) -> None:
        """From now on update exactly the layers in ``names``; those also in ``deferred`` always with a deferred write.

        Raises:
            ValueError: a name that has no hook.
            TypeError: a single string.
        """
        if isinstance(names, str):  # an iterable, of its letters
            raise TypeError(f"names must be several names, got {names!r}: put it in a list")
        names, deferred = dict.fromkeys(names), set(deferred)
        unknown = sorted(names.keys() - self._hooks.keys())
        if unknown:
            raise ValueError(f"names must be layers of this updater, got {', '.join(map(repr, unknown))}")
        self.flush()
        self._any_enabled = bool(names)
        for name, hook in self._hooks.items():
            hook.enabled = name in names
            hook.deferred = hook.deferred or name in deferred
            if hook.enabled and not is_lazy(hook.module.weight):
                hook.counter()  # made here and not in the forward, where torch.compile would recompile for it
                self._step.lr_on(hook.module.weight.device)
            if not hook.enabled:
                self._step.forget(name)
        self._sharding_checked = False
        if self._sums is not None:
            self._sums.bind(list(names), deferred)

    def set_lr(self, lr: float) -> None:
        """Set the signed learning rate, on the devices too (captured graphs read it there).

        Raises:
            ValueError: ``lr`` is not finite.
        """
        check_lr(lr)
        self.flush()
        self._step.set_lr(lr)

    def flush(self) -> None:
        """Make the deferred updates now.

        With a ``ReplicatedModel`` whose ``sync`` is not ``"step"`` all processes must call it: sums that wait are reduced.
        """
        if self._sums is not None:
            self._write_summed(self._sums)  # what was launched
            self._sums.launch()
            self._write_summed(self._sums)
        pending, self._pending = self._pending, {}
        for name, correlation in pending.items():
            self._step.write(self._hooks[name], correlation)

    def discard(self) -> None:
        """Forget the deferred updates: the weights they were made for are gone."""
        self._pending.clear()
        if self._sums is not None:
            self._sums.discard()

    def skipped(self) -> dict[str, int]:
        """Layer name to the number of updates skipped since the last :meth:`reset_counters`, where there were any.

        An update is skipped, and the weight left untouched, where ``||D||_2`` is zero or not finite. Reading waits for
        the device.
        """
        self.flush()
        counted = {name: hook.skipped for name, hook in self._hooks.items() if hook.skipped is not None}
        by_device: dict[torch.device, list[str]] = {}
        for name, counter in counted.items():
            by_device.setdefault(counter.device, []).append(name)
        counts: dict[str, int] = {}
        for names in by_device.values():  # one transfer per device
            counts.update(zip(names, torch.stack([counted[name] for name in names]).tolist(), strict=True))
        return {name: counts[name] for name in counted if counts[name]}

    def parts_only(self) -> list[str]:
        """Enabled layers that ran since the last :meth:`reset_counters`, if ``model`` itself was never called.

        Nothing then says where a mini-batch ends: their correlations are summed until the next :meth:`flush`.
        """
        return [] if self._called else [name for name, hook in self._hooks.items() if hook.enabled and hook.fired]

    def silent(self) -> list[str]:
        """Enabled layers that were never called in the training forwards since the last :meth:`reset_counters`."""
        return [name for name, hook in self._hooks.items() if hook.enabled and not hook.fired] if self._called else []

    def reset_counters(self) -> None:
        """Begin to count anew: skipped updates, training forwards, layers that ran."""
        self.forwards = 0
        self._called = False
        for hook in self._hooks.values():
            hook.fired = False
            if hook.skipped is not None:
                hook.skipped.zero_()

    def remove(self) -> None:
        """Make the deferred updates and take every hook off the model."""
        self.flush()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for hook in self._hooks.values():
            hook.enabled = False

    def state_dict(self) -> dict[str, Any]:
        """Momentum and the counters of the present epoch; deferred updates are made first."""
        skipped = self.skipped()
        return {
            **self._step.state_dict(),
            **({} if self._sums is None else self._sums.state_dict()),
            "skipped": skipped,
            "fired": [name for name, hook in self._hooks.items() if hook.fired],
            "forwards": self.forwards,
            "called": self._called,
            "deferred": [name for name, hook in self._hooks.items() if hook.deferred],
            "turn": int(self._turn),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; deferred updates that are still to be made are forgotten."""
        self.discard()
        self._step.load_state_dict(state, {name: self._hooks[name].module.weight.device for name in state["momentum"]})
        self.forwards = state["forwards"]
        self._called = state.get("called", self.forwards > 0)
        self._turn.fill_(state.get("turn", -1))  # states from before there was `sample` have none
        fired, deferred = set(state["fired"]), set(state["deferred"])
        for name, hook in self._hooks.items():
            hook.fired = name in fired
            hook.deferred = name in deferred
            count = state["skipped"].get(name, 0)
            if count or hook.skipped is not None:
                hook.counter().fill_(count)
        if self._sums is not None:
            self._sums.load_state_dict(state)

    def _eager(self, method: Callable[..., None]) -> Callable[..., None]:
        """What communicates is no part of a compiled graph: it breaks there, as at DistributedDataParallel's own buckets."""
        return method if self.replicas is None else torch.compiler.disable(method)  # type: ignore[no-untyped-call]

    def _begin_forward(self, module: nn.Module) -> None:
        if not torch.compiler.is_compiling() and not self._sharding_checked:  # fully_shard may have come after the hooks
            refuse_sharded(module)
            self._sharding_checked = True
        if self._pending:
            self.flush()
        if self._sums is not None:
            self._write_summed(self._sums)
            if self.paused or not (module.training and torch.is_grad_enabled()):
                self.flush()
            elif self._any_enabled:
                self._sums.begin_forward()
        if self.paused:
            return
        if self.sample < 1 and self._any_enabled and module.training and torch.is_grad_enabled():
            self._turn.add_(1)
        if module.training and torch.is_grad_enabled():
            self._called = True
        if torch.compiler.is_compiling():  # counters would be guarded on, and recompiled for
            return
        self._forward_id += 1
        if module.training and torch.is_grad_enabled():
            self.forwards += 1

    def _end_forward(self, module: nn.Module) -> None:
        if self._sums is None or self.paused or not self._any_enabled:
            return
        if module.training and torch.is_grad_enabled():
            self._sums.end_forward()

    def _update(self, hook: LayerHook, x: Tensor, z: Tensor) -> None:
        if not torch.compiler.is_compiling():
            if under_transform():
                raise RuntimeError(f"layer {hook.name!r} learns locally, {NO_TRANSFORM}")
            if in_backward():
                if hook.last_forward != self._forward_id:
                    raise RuntimeError(
                        f"layer {hook.name!r} runs during the backward pass only: activation checkpointing with "
                        "use_reentrant=True hides its forward from localized learning; use use_reentrant=False"
                    )
                return  # a checkpointed segment is recomputed: it was updated in the forward
            if hook.last_forward == self._forward_id or under_checkpoint():
                hook.deferred = True
                if self._sums is not None:
                    self._sums.hold(hook.name)
            hook.last_forward = self._forward_id
        hook.fired = True
        weight = parameter(hook.module, "weight")
        if type(weight) is not nn.Parameter and not isinstance(weight, nn.Parameter):
            raise RuntimeError(
                f"layer {hook.name!r} learns locally and its weight was replaced (functional_call), {NO_TRANSFORM}"
            )
        in_graph = self.sample < 1 and torch.compiler.is_compiling()  # the graph serves every turn
        if self.sample < 1 and not in_graph:
            _refuse_capture(x)
            x, z = sampled(weight, x, z, self.sample, int(self._turn))
        deferred = hook.deferred or z.requires_grad or self._sums is not None
        if not (deferred or in_graph or self._step.momentum or self.activation is not None):
            # The usual case, and paid for by every layer in every step: nothing here that can be left out.
            lr = self._step.lr_on(weight.device)
            skipped = hook.counter(weight.device)
            ops.hebbian_update_(weight, x, z, lr, normalize=self._step.normalize, skipped=skipped, **hook.arguments())
            return
        with torch.no_grad():
            if self.activation is not None:
                z = self.activation(z.detach())
            if self._sums is not None:
                self._sums.add(hook.name, x, z)
                return
            if in_graph:
                correlation = sampled_correlation(weight, x, z, self.sample, self._turn, **hook.arguments())
            else:
                correlation = ops.correlation(x, z, weight, **hook.arguments())
            if deferred:
                known = self._pending.get(hook.name)
                self._pending[hook.name] = correlation if known is None else known.add_(correlation)
            else:
                self._step.write(hook, correlation)

    def _write_summed(self, sums: ReplicatedSums) -> None:
        """Make the updates whose sums over the processes were launched."""
        summed = sums.take()
        if summed:
            self._step.write_summed(summed)
            sums.clear()


def check_update(*, normalize: object, activation: object, momentum: object, sample: object, algorithm: object) -> None:
    """Check what :class:`HebbianUpdater` takes beside the learning rate.

    Raises:
        ValueError: an argument out of its range.
        TypeError: one of another type.
    """
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be a bool, got {normalize!r}")
    if activation is not None and not callable(activation):
        raise TypeError(f"activation must be callable, got {type(activation).__name__}")
    check_momentum(momentum)
    check_sample(sample)
    if algorithm not in ops.ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ops.ALGORITHMS)}, got {algorithm!r}")


def _refuse_capture(x: Tensor) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("sample must be 1 in a CUDA graph: a replay would see the same slice of the mini-batch for ever")
