"""NaN and infinity in a mini-batch: what they may not touch, and what is said about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .hooks import CallHook

NAN_POLICIES = ("report", "skip", "raise")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether the step that ``optimizer`` is making does nothing: ``GradScaler`` found that its gradients overflow.

    Of most optimizers it does not call ``step()`` then. Fused ones it calls, and says so on the device, for which this waits.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False) and getattr(optimizer, "found_inf", None))


class NonFiniteGuard:
    """Watches a model and its optimizers for NaN and infinity; with ``policy="skip"`` keeps them out of what is learnt.

    That policy lets a mini-batch leave no trace where it would leave NaN or infinity: running statistics are put back as they
    were before it, on the device, and an optimizer's step with any gradient that is not finite does nothing, which waits for
    the device once a step. (Local updates with such a correlation are skipped by the operations themselves.)

    Args:
        policy: one of :data:`NAN_POLICIES`.
        optimizers: whose steps are watched. With gradient accumulation a bad micro-batch costs the whole step.
    Raises:
        ValueError: an unknown policy, or (later, in ``optimizer.step``) a closure, whose gradients come too late.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], policy: str) -> None:
        if policy not in NAN_POLICIES:
            raise ValueError(f"nan_policy must be one of {', '.join(NAN_POLICIES)}, got {policy!r}")
        self.policy = policy
        self.skipped_steps = 0
        """Optimizer steps left out since :meth:`reset`."""
        self.order: dict[str, int] = {}
        """Names to positions in the forward, by which messages are sorted: what is named first is where it began."""
        self._model = model
        self._owners: Counter[str] = Counter()  # layers whose gradients were not finite in those steps
        self._norms: dict[str, _Statistics] = {}
        self._handles: list[Any] = []
        if policy != "skip":
            return
        for name, module in model.named_modules():
            if _keeps_statistics(module):
                norm = self._norms[name] = _Statistics(module)
                # First before and last after all other hooks, or nearly: it is the module itself that is watched.
                self._handles.append(module.register_forward_pre_hook(CallHook(norm.save), prepend=True))
                self._handles.append(module.register_forward_hook(CallHook(norm.put_back)))
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._handles += [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def kept_statistics(self) -> dict[str, int]:
        """Name of a normalisation layer to the forwards after which its statistics were put back, since :meth:`reset`."""
        counts = {name: norm.count for name, norm in self._norms.items() if norm.count is not None}
        return {name: int(count) for name, count in counts.items() if count}

    def findings(self, poisoned: Sequence[str], epoch_loss: float | None) -> list[str]:
        """What is not finite at the end of an epoch, and what was kept from it: a message for each kind, naming layers.

        Args:
            poisoned: layers whose running statistics are not finite.
            epoch_loss: the epoch's mean loss, if it is known.
        """
        found = []
        if epoch_loss is not None and not math.isfinite(epoch_loss):
            found.append(f"the epoch loss is {epoch_loss}")
        if poisoned:
            found.append(
                f"running statistics are no longer finite and will not recover: {', '.join(self._sorted(poisoned))} "
                "(nan_policy='skip' would have kept them)"
            )
        weights = _not_finite(self._model.named_parameters())
        if weights:
            found.append(
                f"parameters are no longer finite: {', '.join(self._sorted(weights))} "
                "(nan_policy='skip' would have kept the optimizer from them)"
            )
        return found

    def kept(self) -> list[str]:
        """What ``policy="skip"`` kept clean in the epoch: a message for each kind, naming layers."""
        found = []
        statistics = self.kept_statistics()
        if statistics:
            found.append(
                f"running statistics put back as they were before a mini-batch made them not finite: {self._listed(statistics)}"
            )
        if self.skipped_steps:
            found.append(
                f"optimizer steps left out because gradients were not finite: {self.skipped_steps}, of the layers {self._listed(self._owners)}"
            )
        return found

    def reset(self) -> None:
        """Begin to count anew."""
        self.skipped_steps = 0
        self._owners.clear()
        for norm in self._norms.values():
            if norm.count is not None:
                norm.count.zero_()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """The counts of the present epoch."""
        return {"statistics": self.kept_statistics(), "steps": self.skipped_steps, "layers": dict(self._owners)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, if anything is counted here."""
        if self.policy != "skip":
            return
        self.skipped_steps, self._owners = state["steps"], Counter(state["layers"])
        for name, norm in self._norms.items():
            norm.set_count(state["statistics"].get(name, 0))

    def _sorted(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: self.order.get(name, len(self.order)))

    def _listed(self, counts: dict[str, int]) -> str:
        return ", ".join(f"{name} ({counts[name]})" for name in self._sorted(counts))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise ValueError("nan_policy='skip' needs step() without a closure: it looks at the gradients before the step")
        if leaves_out(optimizer):
            return
        members = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in members]
        # The largest element: unlike a sum of squares it does not overflow.
        if not gradients or math.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)):
            return
        self.skipped_steps += 1
        named = {self._names.get(p, "?").rpartition(".")[0]: g for p, g in zip(members, gradients, strict=True)}
        self._owners.update(_not_finite(named.items()))
        for p in members:
            p.grad = None  # with zeros, momentum and weight decay would move them


class _Statistics:
    """The running statistics of one normalisation layer, and how they were before its present forward."""

    def __init__(self, module: nn.Module) -> None:
        self.count: Tensor | None = None
        self._saved: dict[str, Tensor] = {}
        self._allocate(module)  # here and not in the forward, where torch.compile would recompile for it

    def save(self, module: nn.Module) -> None:
        if not module.training:
            return
        self._allocate(module)
        for name, saved in self._saved.items():
            saved.copy_(getattr(module, name))

    def put_back(self, module: nn.Module) -> None:
        if not module.training or self.count is None:
            return
        with torch.no_grad():
            finite = torch.isfinite(module.running_mean).all() & torch.isfinite(module.running_var).all()  # type: ignore[arg-type]
            for name, saved in self._saved.items():
                # By .data: batch_norm saves them for its backward, which in training reads none, but checks that none has changed.
                present = getattr(module, name).data
                present.copy_(torch.where(finite, present, saved))
            self.count.add_(~finite)

    def set_count(self, count: int) -> None:
        if self.count is not None:
            self.count.fill_(count)

    def _allocate(self, module: nn.Module) -> None:
        mean = module.running_mean
        assert isinstance(mean, Tensor)
        if self.count is not None and self.count.device == mean.device and self._saved["running_mean"].dtype == mean.dtype:
            return
        if is_lazy(mean):
            return
        before = 0 if self.count is None else self.count.to(mean.device)
        self.count = torch.zeros((), dtype=torch.int64, device=mean.device) + before
        present = {name: getattr(module, name) for name in _STATISTICS}
        self._saved = {name: t.detach().clone() for name, t in present.items() if t is not None}


def _keeps_statistics(module: nn.Module) -> bool:
    return bool(getattr(module, "track_running_stats", False)) and getattr(module, "running_mean", None) is not None


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors with a NaN or an infinity. Waits for each device once."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if not is_lazy(tensor) and tensor.is_floating_point():
            by_device.setdefault(tensor.device, []).append((name, tensor))
    bad: list[str] = []
    for members in by_device.values():
        finite = torch.stack([torch.isfinite(tensor.detach()).all() for _, tensor in members]).tolist()
        bad += [name for (name, _), good in zip(members, finite, strict=True) if not good]
    return bad
