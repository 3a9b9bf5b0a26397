"""Sums the correlations of the local layers over processes, in flat buckets, while the forward goes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

Sync = str | int


def check_sync(sync: object) -> int | None:
    """Forwards from one reduction to the next; ``None``: an epoch's.

    Raises:
        ValueError, TypeError: ``sync`` is not ``"step"``, ``"epoch"`` or an int of at least 1.
    """
    if sync in ("step", "epoch"):
        return 1 if sync == "step" else None
    if isinstance(sync, bool) or not isinstance(sync, int | str):
        raise TypeError(f"sync must be 'step', 'epoch' or an int, got {sync!r}")
    if isinstance(sync, str) or sync < 1:
        raise ValueError(f"sync must be 'step', 'epoch' or an int of at least 1, got {sync!r}")
    return sync


@dataclass(frozen=True)
class Reduced:
    """The sum over processes (and over forwards, if so asked) for one layer."""

    name: str
    correlation: Tensor
    """``D``, of the weight's shape; a view that lasts until the next forward."""
    runs: Tensor
    """How often the layer ran, over all processes: a tensor of one element. 0: ``D`` is zero because there was nothing to sum."""


class _Bucket:
    """Correlations of some layers in one flat tensor, and behind them how often each layer ran."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [weight.numel() for weight in weights.values()]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=device)
        pieces = torch.split(self.flat, [*sizes, len(sizes)])
        self.sums = {name: piece.view(weight.shape) for (name, weight), piece in zip(weights.items(), pieces, strict=False)}
        self.runs = dict(zip(weights, pieces[-1].unbind(), strict=True))
        self.work: dist.Work | None = None

    @property
    def num_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


class CorrelationReducer:
    """Sums ``D`` of every local layer over the processes of ``group``.

    ``D`` is a sum over images, so the sum over processes is that of the whole batch, however unevenly it is shared out. It is
    the same bits on all processes, as every bucket is reduced once and sent to all.

    Buckets are laid out once per boundary and always reduced in the same order, whatever order layers run in: a process that
    skips a layer, or runs it twice, takes part in the same all-reduces as the others. One starts as soon as all of its layers
    and all buckets before it are done. In the first forward nothing is known of layers that run more than once, so that all
    start at its end.

    Args:
        every: reduce what ``every`` forwards summed up (1: each by itself), ``None``: only when :meth:`launch` is called.
        bucket_bytes: a bucket is closed once it holds as much.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, every: int | None = 1, bucket_bytes: int = 1 << 20) -> None:
        self.group = group
        self.every = every
        self.bucket_bytes = bucket_bytes
        self.reduced_bytes = 0
        """Bytes of all buckets given to all-reduce so far."""
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, int] = {}
        self._held: set[str] = set()
        self._waiting: set[str] = set()  # layers that have not run in the present forward
        self._late: dict[str, list[Tensor]] = {}
        self._launched = 0  # buckets
        self._forwards = 0  # since the last launch
        self._in_forward = False
        self._overlap = False

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    def bind(self, weights: Mapping[str, Tensor], held: Collection[str] = ()) -> None:
        """Lay out buckets for the layers of ``weights``, in this order; those ``held`` come last, and wait for the forward's end.

        What was summed and not taken yet is forgotten.
        """
        self.discard()
        order = [name for name in weights if name not in held] + [name for name in weights if name in held]
        self._buckets, self._bucket_of, self._held = [], {}, set(held)
        members: dict[str, Tensor] = {}
        for i, name in enumerate(order):
            weight = weights[name]
            members[name] = weight
            self._bucket_of[name] = len(self._buckets)
            kind = _dtype_of(weight), weight.device
            following = weights[order[i + 1]] if i + 1 < len(order) else None
            size = sum(w.numel() for w in members.values()) * kind[0].itemsize
            if following is None or size >= self.bucket_bytes or (_dtype_of(following), following.device) != kind:
                self._buckets.append(_Bucket(members, *kind))
                members = {}
        self._overlap = False

    def hold(self, name: str) -> None:
        """This layer may run again in the same forward: its bucket waits for the end."""
        self._held.add(name)

    def begin_forward(self) -> None:
        """A training forward begins. What was launched must have been taken."""
        assert self._launched == 0
        self._in_forward = True
        self._waiting = set(self._bucket_of)
        late, self._late = self._late, {}
        for name, correlations in late.items():
            for correlation in correlations:
                self._sum(name, correlation)

    def add(self, name: str, correlation: Tensor) -> None:
        """Take the correlation of a layer that has just run."""
        if self._bucket_of[name] < self._launched:  # it ran before, and never twice until now: counts in the next sum
            self._late.setdefault(name, []).append(correlation)
            return
        self._sum(name, correlation)
        self._waiting.discard(name)
        if self._overlap and self._in_forward and self.every is not None and self._forwards + 1 >= self.every:
            blocked = self._waiting | self._held
            while self._launched < len(self._buckets) and blocked.isdisjoint(self._buckets[self._launched].sums):
                self._launch_next()

    def end_forward(self) -> None:
        """The forward is over: launch what is left, if it is this one's turn."""
        self._in_forward = False
        self._forwards += 1
        self._overlap = True
        if self.every is not None and self._forwards >= self.every:
            self.launch()

    def launch(self) -> None:
        """Reduce all that was summed since the last time; nothing where there was no forward. All processes must call it."""
        if self._forwards or self._launched:
            while self._launched < len(self._buckets):
                self._launch_next()
        self._forwards = 0

    def take(self) -> list[Reduced]:
        """Wait for what was launched, and return it."""
        if self._in_forward:  # it raised
            self.end_forward()
        if not self._launched:
            return []
        assert self._launched == len(self._buckets)
        self._wait()
        return [Reduced(name, bucket.sums[name], bucket.runs[name]) for bucket in self._buckets for name in bucket.sums]

    def clear(self) -> None:
        """Begin new sums, once what :meth:`take` returned was used."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def discard(self) -> None:
        """Forget what was summed."""
        self._wait()
        self.clear()
        self._late.clear()
        self._forwards = 0
        self._in_forward = False

    def _sum(self, name: str, correlation: Tensor) -> None:
        bucket = self._buckets[self._bucket_of[name]]
        bucket.sums[name].add_(correlation)
        bucket.runs[name].add_(1)

    def _launch_next(self) -> None:
        bucket = self._buckets[self._launched]
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
        self._launched += 1
        self.reduced_bytes += bucket.num_bytes

    def _wait(self) -> None:
        for bucket in self._buckets[: self._launched]:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
        self._launched = 0


def _dtype_of(weight: Tensor) -> torch.dtype:
    """What correlations are summed in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
