"""Epochs that begin where a frozen prefix ends, with what it put out in an earlier one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_leaves, tree_unflatten

from .checks import require_numbers
from .hooks import Hook
from .layers import no_trace
from .learning import LocalizedLearning
from .prefix_cut import Cut, Skip, find_cut, instead_of, tell, watch

_MUST_BE_CALLED = (
    "the model must be called with a tensor of the mini-batch as the loader gave it, or moved to another device: normalise, mix and "
    "convert in the data set, the collate function or the model"
)
_BLOCKS = "; of what is compiled, single blocks may be, not the network as a whole"
_NOT_SEEN = "no training forward of the model was seen for the first mini-batch" + _BLOCKS


@dataclass(frozen=True)
class _Kept:
    """A mini-batch with the prefix's output in the place of the model's input."""

    leaves: tuple[Any, ...]
    spec: Any
    index: int
    """Of the model's input among the leaves."""
    shape: torch.Size
    """What it had."""

    @property
    def output(self) -> Tensor:
        output: Tensor = self.leaves[self.index]
        return output

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, Tensor))


class ReplayLoader:
    """Mini-batches of ``loader``; while the boundary stays where it is, those of its first epoch there again and again, as the
    frozen prefix put them out then.

    ::

        local = LocalizedLearning(model, optimizer, epochs=90)
        loader = ReplayLoader(loader, local, memory_budget=4 * 2**30)
        for epoch in range(90):
            for x, y in loader:             # in a replayed epoch x is what the prefix put out
                loss = criterion(model(x), y)   # and the forward begins behind it
                ...
            local.step(epoch_loss)

    A frozen prefix puts out the same whenever it is given the same. In the first epoch after the boundary has moved, what comes out of
    the last module before the boundary is kept, mini-batch by mini-batch; in the epochs until the next move, in an order drawn anew
    from torch's generator, those outputs are handed out, and a forward that is called with one begins behind that module: the prefix does not
    run. That saves its forward pass and the loading of the data, and costs memory, and that no picture is augmented anew in these
    epochs. BatchNorm in the prefix normalises by the statistics of the same mini-batches as before; its running statistics
    stand still. Hooks of modules that do not run are not called.

    The module must be one on whose output alone the rest of the network depends: the end of a residual block, not its
    middle. It is found by trying, in the first epoch after a move. Where there is none, where the outputs of an epoch would not fit
    into ``memory_budget``, or where the model is not called with what the loader gave, nothing is replayed, which is warned of.

    Args:
        loader: yields mini-batches: tensors, or tuples, lists and dictionaries of them. One of the tensors is what the model is
            called with, as it is or moved to another device; nothing may change it in between.
        local: with ``rule="frozen"`` and without a refresh.
        memory_budget: bytes that the outputs of an epoch may take. The larger the images, the more: for ``N`` samples ``N`` times
            what the module returns for one.
        device: where they are kept, such as ``"cpu"``; ``None``: where they were made.
    Raises:
        TypeError, ValueError: an argument that is not that.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        local: LocalizedLearning,
        *,
        memory_budget: float,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"loader must be an iterable of mini-batches, got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError(
                f"loader must be an iterable that begins anew in every epoch, got {type(loader).__name__}, an iterator"
            )
        if not isinstance(local, LocalizedLearning):
            raise TypeError(f"local must be a LocalizedLearning, got {type(local).__name__}")
        if not local.prefix_stands_still:
            what = 'rule="hebbian"' if local.rule == "hebbian" else "a refresh"
            raise ValueError(f'local must have rule="frozen" and refresh=None, or there is nothing to keep: it has {what}')
        require_numbers(memory_budget=memory_budget)
        if not memory_budget > 0:  # so that NaN is refused
            raise ValueError(f"memory_budget must be above 0, got {memory_budget}")
        self.loader = loader
        self.memory_budget = memory_budget
        self.replaying = False
        """Whether the present epoch is replayed, or the last one was."""
        self._local = local
        self._device = None if device is None else torch.device(device)
        self._recording: _Recording | None = None  # what an epoch at the present boundary has left
        self._given_up = -1  # the boundary at which there is nothing to replay
        self._rebuilding = False

    def __len__(self) -> int:
        """Mini-batches in an epoch. Raises ``TypeError`` where ``loader`` does not know."""
        if not isinstance(self.loader, Sized):
            raise TypeError(f"object of type {type(self.loader).__name__} has no len()")
        return len(self.loader)

    @property
    def kept_bytes(self) -> int:
        """That the mini-batches kept take, labels included."""
        return self._recording.nbytes if self._recording is not None else 0

    @property
    def begins_behind(self) -> str | None:
        """Name of the module behind which replayed forwards begin; ``None``: nothing is kept."""
        recording = self._recording
        return recording.cut.module if recording is not None and recording.cut is not None else None

    def forget(self) -> None:
        """Keep nothing of what was recorded: the next epoch is one of ``loader``'s, as after a change of its batch size."""
        self._recording = None

    def __iter__(self) -> Iterator[Any]:
        recording = self._recording
        self.replaying = recording is not None and recording.holds(self._local) and not self._rebuilding
        if recording is not None and self.replaying:
            yield from recording.replay()
            return
        self._recording = None
        recording = _Recording(self._local, self._device, self._rebuilding)
        finished = False
        try:
            yield from self._recorded(recording)
            finished = True
        finally:
            recording.close()
            if finished and recording.kept:  # of an epoch that was broken off a part would be replayed
                self._recording = recording

    def _recorded(self, recording: _Recording) -> Iterator[Any]:
        count = len(self.loader) if isinstance(self.loader, Sized) else 1
        wanted = recording.boundary != self._given_up
        for number, batch in enumerate(self.loader):
            if not wanted:
                recording.close()
                yield batch
                continue
            recording.expect(batch)
            yield batch
            reason = recording.keep(first=number == 0)
            if reason is None and recording.kept:
                expected = max(recording.nbytes, recording.nbytes * count // len(recording.kept))
                if expected > self.memory_budget:
                    reason = (
                        f"what the prefix puts out in an epoch takes {expected / 2**20:.1f} MiB, more than memory_budget, "
                        f"{self.memory_budget / 2**20:.1f} MiB"
                    )
            if reason is not None:
                recording.close()
                recording.kept.clear()
                self._given_up = recording.boundary
                self.warn(f"no epoch at boundary {recording.boundary} is replayed: {reason}")
            wanted = reason is None and (recording.boundary > 0 or number == 0)

    def warn(self, text: str) -> None:
        """Says why nothing is replayed. A subclass may say it elsewhere."""
        warnings.warn(text, UserWarning, stacklevel=4)  # where the user's loop is

    @contextlib.contextmanager
    def rebuilding(self) -> Iterator[None]:
        """A context for one epoch of forwards that record again what was kept before a run was resumed, and change nothing.

        ::

            with loader.rebuilding():
                for x, y in loader:     # the same mini-batches as in the first epoch after the boundary's last move
                    model(x)

        Without it a resumed run records in its first epoch.
        """
        self._rebuilding = True
        try:
            with no_trace(self._local.model, aside=False), torch.no_grad():
                yield
        finally:
            self._rebuilding = False


class _Call(Hook):
    """Hands a hook's call on, but not in graphs of ``torch.compile``: what is compiled as a whole cannot be replayed."""

    def __init__(self, action: Callable[..., Any]) -> None:
        self._action = action

    def __call__(self, *args: Any) -> Any:
        return None if torch.compiler.is_compiling() else self._action(*args)


class _Recording:
    """What the prefix puts out in an epoch, and the forwards that begin with it."""

    def __init__(self, local: LocalizedLearning, device: torch.device | None, without_gradients: bool) -> None:
        self.boundary = local.boundary
        self.cut: Cut | None = None
        self.kept: list[_Kept] = []
        self.nbytes = 0
        self._local, self._model, self._device = local, local.model, device
        self._without_gradients = without_gradients
        self._expected: tuple[list[Any], Any] | None = None  # leaves and structure of the mini-batch
        self._called: _Called | None = None  # the forward that was made with it
        self._output: Tensor | None = None  # of the cut in that forward
        self._outputs: dict[torch.Size, Any] = {}  # of the modules that are skipped, by the shape of the model's input
        self._frozen: list[tuple[nn.Parameter, int]] = []
        self._skip: Skip | None = None
        self._stop_telling: Callable[[], None] = lambda: None
        self._handles = [self._model.register_forward_pre_hook(_Call(self._before), prepend=True, with_kwargs=True)]

    def close(self) -> None:
        """Record no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop_telling()
        self._stop_telling = lambda: None
        self._expected = self._called = self._output = None

    def holds(self, local: LocalizedLearning) -> bool:
        """Whether the prefix would still put out the same."""
        return local.boundary == self.boundary and all(p._version == v and not p.requires_grad for p, v in self._frozen)

    # ---------------------------------------------------------------- the epoch in which it is recorded

    def expect(self, batch: Any) -> None:
        """``batch`` is handed out next."""
        self._expected, self._called, self._output = tree_flatten(batch), None, None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or not (torch.is_grad_enabled() or self._without_gradients):
            return
        if self._called is None and self._expected is not None:
            self._called = _Called.of(self._expected[0], args, kwargs, thorough=not self.kept)

    def keep(self, *, first: bool) -> str | None:
        """Keep what came out of the prefix for the mini-batch handed out last, the ``first`` or not; returns why nothing can be kept,
        or ``None``."""
        assert self._expected is not None
        called, output, (leaves, spec) = self._called, self._output, self._expected
        self._expected = self._called = self._output = None
        if called is None:  # the user has left it out
            return _NOT_SEEN if first else None
        if called.index is None:
            return _MUST_BE_CALLED
        if self.boundary == 0:
            return None
        x = called.x
        if self.cut is None:
            with called.autocast():
                self.cut = find_cut(self._model, self._local.plan, self.boundary, x, called.args, called.kwargs)
            if self.cut is None:
                return (
                    "what comes before the boundary does not end in a module on whose output alone the rest depends" + _BLOCKS
                )
            self._begin_recording(self.cut)
        if x.shape not in self._outputs:
            with called.autocast():
                seen, made = watch(self._model, called.args, called.kwargs, keep=self.cut.module)
            self._outputs[x.shape] = seen.skipped_outputs(self.cut)
            output = made if output is None else output  # of the first mini-batch, for which the cut was not known
        if output is None:
            return f"{self.cut.module} was not called in a forward"
        leaves[called.index] = output if self._device is None else output.to(self._device)
        kept = _Kept(tuple(leaves), spec, called.index, x.shape)
        self.kept.append(kept)
        self.nbytes += kept.nbytes
        return None

    def _begin_recording(self, cut: Cut) -> None:
        def note(output: Tensor) -> None:
            if self._called is not None and self._output is None:
                self._output = output.detach().clone() if cut.overwritten else output.detach()

        self._stop_telling = tell(self._model.get_submodule(cut.module), note)
        self._skip = Skip(self._model, cut)
        plan, parameters = self._local.plan, dict(self._model.named_parameters())
        prefix = [parameters[name] for name in plan.prefix(plan.parameters, self.boundary)]
        self._frozen = [(parameter, parameter._version) for parameter in prefix]

    # ---------------------------------------------------------------- the epochs in which it is replayed

    def replay(self) -> Iterator[Any]:
        """The mini-batches with the outputs, in another order; forwards with one begin behind the cut."""
        now = self.kept[:1]
        skip = self._skip
        assert skip is not None

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            learns = module.training and torch.is_grad_enabled()
            z = now[0].output
            given = next((leaf for leaf in tree_iter((args, kwargs)) if leaf is z or (learns and _is(leaf, z))), None)
            if given is None:
                if learns:
                    raise RuntimeError(f"in an epoch that is replayed, {_MUST_BE_CALLED}")
                return None
            skip.begin(given, self._outputs[now[0].shape])
            meta = torch.empty(now[0].shape, dtype=given.dtype, device="meta")
            return instead_of(given, meta, args, kwargs)

        def after(module: nn.Module, *_: Any) -> None:
            skip.end()

        handles = [
            self._model.register_forward_pre_hook(_Call(before), with_kwargs=True),
            self._model.register_forward_hook(_Call(after), always_call=True),
        ]
        try:
            for index in torch.randperm(len(self.kept)).tolist():
                now[:] = [self.kept[index]]
                yield tree_unflatten(list(now[0].leaves), now[0].spec)
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Called:
    """A training forward: what the model was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    """The tensor of the mini-batch among them."""
    index: int | None
    """Which leaf of the mini-batch that is; ``None``: none."""
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    """A context like the forward's."""

    @classmethod
    def of(cls, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, thorough: bool) -> _Called | None:
        """``None``: with no tensor at all. ``thorough``: compare values too, for which a device may have to be waited for."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not tensors:
            return None
        for x in tensors:
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and (_is(x, leaf) and (not thorough or _same(x, leaf))):
                    return cls(args, kwargs, x, index, _autocast_of(x.device.type))
        return cls(args, kwargs, tensors[0], None, _autocast_of(tensors[0].device.type))


def _is(one: Any, other: Tensor) -> bool:
    """Whether ``one`` may be ``other``, as it is or moved to another device."""
    return one is other or (isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other.to(one.device))


def _autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Makes contexts with the present autocast of ``device``."""
    enabled, dtype, cached = (
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
        torch.is_autocast_cache_enabled(),
    )
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)
