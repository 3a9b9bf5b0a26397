"""Sums the correlations of the local layers, or what they are made of, over processes, in flat buckets, while the forward goes on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
    total: Tensor
    """Of what was added: ``D``, of the weight's shape, or so many numbers as were asked for. A view that lasts until the next forward."""
    runs: Tensor
    """How often the layer ran, over all processes: a tensor of one element. 0: ``total`` is zero as there was nothing to sum."""


class _Bucket:
    """Sums of some layers in one flat tensor, and behind them how often each layer ran."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=dtype, device=device)
        pieces = torch.split(self.flat, [*sizes, len(sizes)])
        self.sums = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=False)}
        self.runs = dict(zip(shapes, pieces[-1].unbind(), strict=True))
        self.work: dist.Work | None = None

    @property
    def num_bytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


class CorrelationReducer:
    """Sums ``D`` of every local layer, or what ``D`` is linear in, over the processes of ``group``.

    Both are sums over images, so the sum over processes is that of the whole batch, however unevenly it is shared out. It is
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
        self._weights: Mapping[str, Tensor] = {}
        self._last: set[str] = set()  # layers whose buckets come last
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
        self._weights, self._last, self._held = dict(weights), set(held), set(held)
        self.lay_out({})
        self._overlap = False

    def lay_out(self, sizes: Mapping[str, int]) -> None:
        """Lay buckets out anew: for a layer in ``sizes`` so many numbers are summed, in the place of ``D``.

        Between two sums, when nothing waits, and on all processes alike.
        """
        assert self._launched == 0
        weights, held = self._weights, self._last
        order = [name for name in weights if name not in held] + [name for name in weights if name in held]
        self._buckets, self._bucket_of = [], {}
        members: dict[str, Sequence[int]] = {}
        for i, name in enumerate(order):
            weight = weights[name]
            members[name] = (sizes[name],) if name in sizes else weight.shape
            self._bucket_of[name] = len(self._buckets)
            kind = _dtype_of(weight), weight.device
            following = weights[order[i + 1]] if i + 1 < len(order) else None
            size = sum(map(math.prod, members.values())) * kind[0].itemsize
            if following is None or size >= self.bucket_bytes or (_dtype_of(following), following.device) != kind:
                self._buckets.append(_Bucket(members, *kind))
                members = {}

    def has_left(self, name: str) -> bool:
        """Whether what is added for this layer now comes too late for the present sum, and counts in the next."""
        return self._bucket_of[name] < self._launched

    def hold(self, name: str) -> None:
        """This layer may run again in the same forward: its bucket waits for the end."""
        self._held.add(name)

    def begin_forward(self) -> None:
        """A training forward begins. What was launched must have been taken."""
        assert self._launched == 0
        self._in_forward = True
        self._waiting = set(self._bucket_of)
        late, self._late = self._late, {}
        for name, summands in late.items():
            for summand in summands:
                self._sum(name, summand)

    def add(self, name: str, summand: Tensor) -> None:
        """Take the correlation of a layer that has just run, or what :meth:`lay_out` has in its place."""
        if self.has_left(name):  # it ran before, and never twice until now
            self._late.setdefault(name, []).append(summand)
            return
        self._sum(name, summand)
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

    def _sum(self, name: str, summand: Tensor) -> None:
        bucket = self._buckets[self._bucket_of[name]]
        bucket.sums[name].add_(summand)
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
