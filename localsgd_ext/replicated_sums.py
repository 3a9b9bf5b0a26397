"""What the local layers of a ReplicatedModel sum over its processes, and how these agree on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .layer_hook import LayerHook
from .reference import gram_sums_size

if TYPE_CHECKING:
    from .distributed import ReplicatedModel


@dataclass(frozen=True)
class Pick:
    """What all processes do for a layer."""

    algorithm: str = ""
    """Empty: each the updater's."""
    seen: str = ""
    """Where Gram sums are reduced in the place of ``D``: the dtype that the forward multiplied in, as a string for checkpoints."""

    @property
    def gram(self) -> torch.dtype | None:
        """That dtype; None: ``D`` is reduced."""
        return getattr(torch, self.seen) if self.seen else None


class _LayerSum:
    """What is summed of one layer: ``D``, or the Gram sums that ``D`` is linear in."""

    def __init__(self, hook: LayerHook) -> None:
        self.hook = hook
        self.agreed = Pick()
        self.gram: torch.dtype | None = None
        """Where its Gram sums are reduced in the place of ``D``: the dtype of the forward's product."""

    def agree(self, pick: Pick) -> None:
        self.agreed = pick
        self.hook.algorithm = pick.algorithm

    def summand(self, x: Tensor, z: Tensor, gram: torch.dtype | None) -> Tensor:
        """What is added up over processes: ``D``, or the sums it is made of where ``gram`` is not None."""
        arguments, weight = self.hook.arguments(), self.hook.module.weight
        if gram is None:
            return ops.correlation(x, z, weight, **arguments)
        del arguments["z_is_output"], arguments["algorithm"]
        return ops.gram_sums(x, weight, **arguments)

    def pick_for(self, x: Tensor, z: Tensor) -> Pick | None:
        """What all processes should do with operands like these; None: they tell nothing."""
        arguments, weight = self.hook.arguments(), self.hook.module.weight
        if ops.obstacle(weight, x, z):
            return None
        algorithm = own = arguments.pop("algorithm")
        if algorithm == "auto":
            algorithm = ops.plan(x, z, weight, **arguments).pick
        bias = self.hook.module.bias
        # The product W·G is made later, so that W and b must not change until then; and on a GPU G does not leave the kernel.
        frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
        reduced = algorithm == "gram" and weight.is_cpu and frozen and self.gram_size() < weight.numel()
        return Pick("" if algorithm == own else algorithm, str(z.dtype)[6:] if reduced else "")

    def versions(self) -> tuple[int, ...]:
        """Of what Gram sums are multiplied by later: others once somebody has written into it."""
        return tuple(p._version for p in (self.hook.module.weight, self.hook.module.bias) if p is not None)

    def gram_size(self) -> int:
        return gram_sums_size(self.hook.module.weight, self.hook.module.bias, self.hook.groups)

    def correlation_of(self, total: Tensor) -> Tensor:
        """``D`` of what was reduced."""
        if self.gram is None:
            return total
        dtype = self.gram
        weight, bias = (
            p if p is None or p.dtype.itemsize <= dtype.itemsize else p.to(dtype)
            for p in (self.hook.module.weight, self.hook.module.bias)
        )
        return ops.correlation_of_gram_sums(total, weight, bias=bias, groups=self.hook.groups)


@dataclass(frozen=True)
class Summed:
    """The sum over processes (and over forwards, if so asked) for one layer."""

    hook: LayerHook
    correlation: Tensor
    """``D``. Lasts until :meth:`ReplicatedSums.clear`."""
    runs: Tensor
    """How often the layer ran, over all processes: a tensor of one element. 0: ``D`` is zero as there was nothing to sum."""


class ReplicatedSums:
    """The sums of the enabled layers of a :class:`localsgd_ext.distributed.ReplicatedModel`: operands go in, ``D`` of the whole batch comes
    out.

    The first forward after :meth:`bind` sums up ``D``. At its end all processes take what the first one picked: the algorithms, and
    where Gram sums are added up in the place of ``D``, which the next sum begins with.

    Args:
        replicas: whose reducer sums them up.
        hooks: those of all layers there are, by name.
    """

    def __init__(self, replicas: ReplicatedModel, hooks: Mapping[str, LayerHook]) -> None:
        self._replicas, self._reducer = replicas, replicas.reducer
        self._layers = {name: _LayerSum(hook) for name, hook in hooks.items()}
        self._bound: tuple[list[str], set[str]] = [], set()  # what the reducer has buckets for
        self._proposed: dict[str, Pick] = {}  # by the first process
        self._picks: dict[str, Pick] | None = None  # what it takes, by layer; None: not agreed upon yet
        self._picks_wait = False  # what they say of G is for the sums after the present ones
        self._summed_with: dict[str, tuple[int, ...]] = {}  # versions when the present sums of G began
        self._said_changed = False

    @property
    def grams(self) -> dict[str, torch.dtype]:
        """Layers whose Gram sums are added up in the place of ``D``, and the dtype of the forward's product."""
        return {name: layer.gram for name, layer in self._layers.items() if layer.gram is not None}

    def bind(self, names: list[str], held: set[str]) -> None:
        """Sum up these layers from now on; those ``held`` may run more than once in a forward. Nothing waits to be reduced."""
        if (names, held) == self._bound:
            return
        self._bound = names, held
        self._reducer.bind({name: self._layers[name].hook.module.weight for name in names}, held)
        self._set_picks(None)
        self._picks_wait = False
        for layer in self._layers.values():
            layer.gram = None

    def hold(self, name: str) -> None:
        """This layer may run again in the same forward."""
        self._reducer.hold(name)

    def begin_forward(self) -> None:
        """A training forward begins. What was launched must have been taken."""
        self._reducer.begin_forward()

    def add(self, name: str, x: Tensor, z: Tensor) -> None:
        """Take the operands of a layer that has just run."""
        layer = self._layers[name]
        counts_next = self._reducer.has_left(name)
        gram = layer.agreed.gram if self._picks_wait and counts_next else layer.gram
        self._reducer.add(name, layer.summand(x, z, gram))
        if gram is not None and not counts_next:  # what does is multiplied by the weight that is yet to be written
            self._summed_with.setdefault(name, layer.versions())
        if self._picks is None and self._replicas.rank == 0:
            pick = layer.pick_for(x, z)
            if pick is not None:
                self._proposed[name] = pick

    def end_forward(self) -> None:
        """The forward is over."""
        self._reducer.end_forward()
        if self._picks is None:  # the first process's are taken: those of others may differ, if they are timed
            self._set_picks(self._replicas.from_first(self._proposed))

    def launch(self) -> None:
        """Reduce what was summed since the last time. All processes must call it."""
        self._reducer.launch()

    def take(self) -> list[Summed]:
        """Wait for what was launched and return it; call :meth:`clear` once it was used."""
        taken = self._reducer.take()
        if taken:
            self._report_changed()
        summed = []
        with torch.no_grad():
            for each in taken:
                layer = self._layers[each.name]
                summed.append(Summed(layer.hook, layer.correlation_of(each.total), each.runs))
        return summed

    def clear(self) -> None:
        """Begin new sums, once what :meth:`take` returned was used."""
        self._reducer.clear()
        if self._picks_wait:
            self._begin_grams()

    def discard(self) -> None:
        """Forget what was summed."""
        self._summed_with.clear()
        self._reducer.discard()

    def state_dict(self) -> dict[str, Any]:
        """What was agreed upon."""
        return {
            "picks": None if self._picks is None else {name: asdict(pick) for name, pick in self._picks.items()},
            "picks_of": self._picks_of(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. Nothing waits to be reduced.

        Where it says nothing of these layers (it is of one process, say), the next forward agrees anew.
        """
        # Not always anew: the first sums would be of D, and round otherwise than where the state was saved.
        picks = state.get("picks") if state.get("picks_of") == self._picks_of() else None
        self._set_picks(None if picks is None else {name: Pick(**saved) for name, saved in picks.items()})
        self._begin_grams()

    def _picks_of(self) -> list[list[str]]:
        """What picks are for: those of other layers, or of another kind of device, mean nothing here."""
        return [[name, of.hook.module.weight.device.type] for name, of in self._layers.items() if of.hook.enabled]

    def _set_picks(self, picks: dict[str, Pick] | None) -> None:
        self._picks = picks
        self._proposed = {}
        for name, layer in self._layers.items():
            layer.agree(Pick() if picks is None else picks.get(name, Pick()))
        self._picks_wait = True

    def _begin_grams(self) -> None:
        """From now on sum up what the picks say; nothing waits to be reduced."""
        self._picks_wait = False
        before = self.grams
        for layer in self._layers.values():
            layer.gram = layer.agreed.gram if layer.hook.enabled else None
        if before != self.grams:
            self._reducer.lay_out({name: self._layers[name].gram_size() for name in self.grams})

    def _report_changed(self) -> None:
        """Warn once of weights that are no longer those that sums were made with; the sums are over."""
        changed = [name for name, versions in self._summed_with.items() if versions != self._layers[name].versions()]
        self._summed_with.clear()
        if changed and not self._said_changed:
            self._said_changed = True
            warnings.warn(
                f"weight or bias of {', '.join(changed)} changed between a forward and the local update that is made of it before the "
                "next one, and is multiplied by them: it is not that of the weights in the forward (call flush() of the ReplicatedModel "
                "before you change a weight, and leave such a bias frozen)",
                UserWarning,
                stacklevel=2,
            )
