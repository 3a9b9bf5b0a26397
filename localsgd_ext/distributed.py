"""Data parallel training on ``torch.distributed``: one model, a process per device, each with its share of every mini-batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .reduction import CorrelationReducer, Sync, check_sync
from .wrappers import refuse_wrappers

if TYPE_CHECKING:
    from .learning import LocalizedLearning

_KEPT = 2  # wrappers: of mini-batches that back-propagate through the prefix, and of those that do not


@dataclass
class Traffic:
    """What was given to all-reduce by one process, in bytes."""

    steps: int = 0
    """Training forwards."""
    correlations: int = 0
    """Of the local layers."""
    gradients: int = 0
    """Of the parameters that need them."""

    @property
    def per_step(self) -> float:
        return (self.correlations + self.gradients) / self.steps if self.steps else 0.0


class ReplicatedModel(nn.Module, Joinable):
    """``DistributedDataParallel`` for a model whose set of trained parameters changes while it trains.

    ::

        dist.init_process_group()
        model = ReplicatedModel(network, device_ids=[local_rank])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        local = LocalizedLearning(model, optimizer, epochs=90)   # the rest as with one process

    ``DistributedDataParallel`` notes at its construction which parameters get gradients, and fails or lets replicas drift when
    that changes. Here every forward looks which do, and goes through a wrapper made for just these: a new one after a boundary
    has moved, and with ``LocalizedLearning(refresh=m)`` two in turn, each with gradient buckets of its own. No wrapper searches
    for unused parameters.

    Correlations of local layers are *summed* over the processes, in flat buckets while the forward goes on, and the weights
    written before their next use: by the next forward, in training or not, by ``state_dict()`` or by :meth:`flush`. ``D`` is a
    sum over images, so that this is the step of one process with the whole batch, however unevenly it is shared out. Gradients
    are averaged over processes, which is the whole batch's only where all shares are of one size. Where the
    first process computes ``D = W·G`` by the Gram form on a CPU, and the lower half of the symmetric ``G`` is fewer numbers (layers
    that widen), ``G`` is summed instead and each process makes the same product of it, before the write; a boundary's first sum is of
    ``D`` everywhere. What comes too late for a sum and counts in the next is multiplied by that one's weight.
    The weights of local layers must therefore not change between a forward and the next use of the model, which is warned of once: call
    :meth:`flush` before you clamp them after ``optimizer.step()``, and thaw no bias of theirs. Use autocast in all forwards of a
    boundary or in none, and call ``keep_frozen`` between mini-batches.

    Before the first training forward ``LocalizedLearning`` makes one more, with copies of its tensors and in the modes that the modules
    have, to find the order of the layers. It changes no parameter, buffer or random number generator; but hooks and Python state of
    your own see two forwards (``LocalizedLearning.trace(example)`` beforehand has it where you want it). All processes must make the
    same number of training forwards; see :meth:`join` for loaders that do not. The number of
    bytes reduced is in :attr:`traffic`.

    Compile the network, not this. Hooks of local layers break its graph, as they communicate. With ``sync`` other than ``"step"`` a
    mini-batch whose correlations are not finite, on any process, costs the whole sum that it is part of.

    Args:
        model: the network, on its device, before localized learning is attached; not wrapped or sharded itself.
        sync: when correlations are reduced: ``"step"``: in every training forward; an int ``n``: in every ``n``-th, what the
            ``n`` summed up; ``"epoch"``: when ``LocalizedLearning.step()`` is called. Each reduction makes one normalised
            step, of length ``lr``: there are fewer steps, not longer ones. A forward in evaluation mode, one that
            back-propagates through the prefix, and ``state_dict()`` reduce what waits: with ``sync`` other than ``"step"`` all
            processes must reach them together.
        bucket_bytes: correlations are reduced in buckets of at least so many bytes.
        ddp_kwargs: for ``DistributedDataParallel``.
    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, or the processes hold different networks.
        TypeError, ValueError: a model that cannot be supported, an argument out of its range.
    """

    def __init__(self, model: nn.Module, *, sync: Sync = "step", bucket_bytes: int = 1 << 20, **ddp_kwargs: Any) -> None:
        super().__init__()
        Joinable.__init__(self)
        if isinstance(model, ReplicatedModel):
            raise TypeError("model must not be in a ReplicatedModel already")
        refuse_wrappers(model)
        every = check_sync(sync)
        if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int):
            raise TypeError(f"bucket_bytes must be an int, got {bucket_bytes!r}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ReplicatedModel needs the processes' group: call torch.distributed.init_process_group() first")
        self.module = model
        self.sync = sync
        init_sync = ddp_kwargs.pop("init_sync", True)  # at the start only: later it would hide what drifted
        self._ddp_kwargs = ddp_kwargs
        self._watched = list(model.parameters())
        self._grad_sync = True
        self._stale = False
        # Not in a ModuleList: the wrappers hold the model, whose parameters would be listed again.
        self._wrappers: dict[tuple[bool, ...], DistributedDataParallel] = {}
        wrapper = self._wrap(init_sync=init_sync)
        self._group: dist.ProcessGroup = wrapper.process_group
        self.rank = dist.get_rank(self._group)
        self.num_processes = dist.get_world_size(self._group)
        self.reducer = CorrelationReducer(self._group, every=every, bucket_bytes=bucket_bytes)
        self._traffic = Traffic()
        self.before_training: Callable[..., object] | None = None
        """Called with the arguments of the next training forward, before it; ``LocalizedLearning`` finds the order of layers so."""

    # ---------------------------------------------------------------- the model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward; the arguments are this process's share."""
        Join.notify_join_context(self)
        if self.before_training is not None and self.module.training and torch.is_grad_enabled():
            # Not in the middle of the forward: its wrapper would give what gets frozen there gradients of zero.
            moved_args, moved_kwargs = self._on_device((args, kwargs))
            self.before_training(*moved_args, **moved_kwargs)
        if self._stale:
            self._drop(len(self._wrappers))
            self._stale = False
        if not torch.is_grad_enabled():
            wrapper = next(reversed(self._wrappers.values())) if self._wrappers else self._wrap()
        else:
            needed = tuple(parameter.requires_grad for parameter in self._watched)
            wrapper = self._wrappers.get(needed) or self._wrap()
            if self.training:
                self._traffic.steps += 1
                if self._grad_sync:
                    pairs = zip(self._watched, needed, strict=True)
                    self._traffic.gradients += sum(p.numel() * p.element_size() for p, need in pairs if need)
        wrapper.training = self.training
        wrapper.require_backward_grad_sync = self._grad_sync
        return wrapper(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients are summed up without being reduced, as by ``DistributedDataParallel.no_sync``; correlations are reduced."""
        before, self._grad_sync = self._grad_sync, False
        try:
            yield
        finally:
            self._grad_sync = before

    def rewrap(self) -> None:
        """Forget the wrappers made so far: the parameters that need gradients have changed for good.

        ``LocalizedLearning`` calls it by itself. The next forward makes a new one, without communication: the replicas are not
        made equal again, see :func:`check_replicas`.
        """
        self._stale = True  # and not now: the boundary may move in a forward (the first one), whose backward is still to come

    def flush(self) -> None:
        """Write the weights of local layers that wait for it; with ``sync`` other than ``"step"`` all processes must call it."""
        self.module.state_dict(keep_vars=True)  # the updater, which hooks it

    @property
    def traffic(self) -> Traffic:
        """Bytes given to all-reduce since the start; a copy."""
        return Traffic(self._traffic.steps, self.reducer.reduced_bytes, self._traffic.gradients)

    # ---------------------------------------------------------------- uneven loaders

    def join(self) -> AbstractContextManager[Any]:
        """``with model.join():`` around an epoch: if one process runs out of batches early, all raise ``RuntimeError``.

        Without it the others wait until the process group's timeout. Goes by ``torch.distributed.algorithms.Join`` and waits
        for a small all-reduce in every forward. There is no form that trains on with fewer processes: they would miss optimizer
        steps, and with them momentum, boundary moves and refreshes.
        """
        return Join([self], throw_on_early_termination=True)

    def join_hook(self, **_kwargs: Any) -> JoinHook:
        return JoinHook()

    @property
    def join_device(self) -> torch.device:
        return self._watched[0].device

    @property
    def join_process_group(self) -> Any:
        return self._group

    # ---------------------------------------------------------------- between the processes

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every process, in the order of ranks. All processes must call it."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.join_device)
        everyone = [torch.empty_like(mine) for _ in range(self.num_processes)]
        dist.all_gather(everyone, mine, group=self._group)
        return [each.tolist() for each in everyone]

    def agree(
        self, loss: float | None, norm: float | None, *, refused: bool = False
    ) -> tuple[float | None, float | None, list[int]]:
        """The mean of the losses of all processes that have one, the largest of their norms, and the ranks of those that ``refused``
        the loss they were given. All processes must call it."""
        mine = [loss or 0.0, float(loss is not None), norm or 0.0, float(refused)]
        losses, given, norms, refusing = zip(*self.gather(mine), strict=True)
        mean = sum(losses) / sum(given) if any(given) else None
        return mean, None if norm is None else max(norms), [rank for rank, refuses in enumerate(refusing) if refuses]

    def check(self, local: LocalizedLearning) -> None:
        """See :func:`check_replicas`."""
        check_replicas(local)

    def from_first(self, value: Any) -> Any:
        """The first process's ``value``, which may be anything that can be pickled. All processes must call it."""
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0, device=self.join_device)
        return values[0]

    def broadcast_buffers(self) -> None:
        """Give all processes the first one's buffers (BatchNorm's statistics), as a forward of ``DistributedDataParallel`` does."""
        for buffer in self.module.buffers():
            dist.broadcast(buffer, group=self._group, group_src=0)

    # ---------------------------------------------------------------- inside

    def _on_device(self, inputs: Any) -> Any:
        """As the wrapper gives them to the network."""
        devices = self._ddp_kwargs.get("device_ids")
        return tree_map_only(Tensor, lambda t: t.to(devices[0]), inputs) if devices else inputs

    def _drop(self, count: int) -> None:
        """Take the ``count`` oldest wrappers' hooks off the parameters."""
        for needed in list(self._wrappers)[: max(0, count)]:
            self._wrappers.pop(needed)._remove_autograd_hooks()  # type: ignore[no-untyped-call]

    def _wrap(self, *, init_sync: bool = False) -> DistributedDataParallel:
        self._drop(len(self._wrappers) + 1 - _KEPT)
        wrapper = DistributedDataParallel(self.module, init_sync=init_sync, **self._ddp_kwargs)
        self._wrappers[tuple(parameter.requires_grad for parameter in self._watched)] = wrapper
        return wrapper


def check_replicas(model: nn.Module | LocalizedLearning, *, buffers: bool = False) -> None:
    """Compare the replicas bit for bit, and repair nothing. All processes must call it.

    Compares parameters and, of a :class:`LocalizedLearning`, what the next steps depend on: the optimizers' tensors, local momentum,
    boundary, sign, what is frozen and when the next refresh is.
    ``LocalizedLearning`` calls it for itself before the boundary moves.

    Args:
        model: a :class:`ReplicatedModel`, a ``LocalizedLearning`` of one, or any module.
        buffers: compare buffers too. BatchNorm's statistics differ between two forwards, each process having its own.
    Raises:
        RuntimeError: replicas differ, with the name of the first tensor that does and the ranks that differ from rank 0; or
            ``torch.distributed`` is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("check_replicas needs the processes' group: call torch.distributed.init_process_group() first")
    local = None if isinstance(model, nn.Module) else model
    whole = model if isinstance(model, nn.Module) else model.replicas or model.model
    group = whole._group if isinstance(whole, ReplicatedModel) else None
    network = whole.module if isinstance(whole, ReplicatedModel | DistributedDataParallel) else whole
    if isinstance(whole, ReplicatedModel):
        whole.flush()
    digests = [(f"parameter {name}", _digest(tensor)) for name, tensor in network.named_parameters()]
    if buffers:
        digests += [(f"buffer {name}", _digest(tensor)) for name, tensor in network.named_buffers()]
    if local is not None:
        digests += [(name, _digest(value)) for name, value in local.replicated_state()]
    all_of_it = hashlib.blake2b(repr(digests).encode(), digest_size=8).digest()
    mine = torch.tensor(list(all_of_it), dtype=torch.uint8, device=next(network.parameters()).device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    if all(torch.equal(each, everyone[0]) for each in everyone):
        return
    lists: list[list[tuple[str, str]]] = [[] for _ in everyone]
    dist.all_gather_object(lists, digests, group=group)
    names = dict.fromkeys(name for digests in lists for name, _ in digests)
    by_rank = [dict(digests) for digests in lists]
    differing = [name for name in names if any(of.get(name) != by_rank[0].get(name) for of in by_rank)]
    ranks = [str(rank) for rank, of in enumerate(by_rank) if of.get(differing[0]) != by_rank[0].get(differing[0])]
    raise RuntimeError(
        f"replicas differ: {differing[0]} is not the same on rank {', '.join(ranks)} as on rank 0"
        + (f"; so are {len(differing) - 1} others" if len(differing) > 1 else "")
    )


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    found = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
