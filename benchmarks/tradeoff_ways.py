"""The ways to train a prefix that benchmarks/tradeoff.py compares."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """How a prefix of at most ``l_max`` of the layers grows from epoch ``start`` on, and what it learns."""

    growth: str = "none"
    """``"linear"``, ``"quadratic"``, ``"exponential"`` from 0 on, ``"jump"``: all of it at once; ``"drift"``: over the layers whose
    outputs for the same pictures change by less than ``drift`` in an epoch; ``"none"``: SGD alone."""
    l_max: float = 0.9
    start: float = 0.0
    """Share of the run."""
    thaw: float = 1.0
    """Share of the run after which all layers learn again."""
    epochs: float = 1.0
    """Share of SGD's: the learning rate makes all its steps in them."""
    every: int = 0
    """One in so many mini-batches back-propagates through the prefix; 0: none."""
    rarer: bool = False
    """At the first learning rate one in so many, at half of it one in twice as many, and so on."""
    by_loss: bool = False
    """The ones with the highest losses, instead of one every so often, see ``benchmarks/tradeoff_gates.py``."""
    nested: bool = False
    """Twice as many back-propagate through the prefix's second half."""
    held: bool = False
    """In between, the optimizer goes on with the prefix's last gradient ("linear drift", Vlaar & Leimkuhler 2022)."""
    power: float = 0.0
    """The prefix's gradients are multiplied by ``every ** power`` (1: Vlaar & Leimkuhler's larger steps)."""
    sliced: bool = False
    """One in ``every`` pictures of each mini-batch back-propagates through the prefix, instead of one in so many mini-batches."""
    drawn: bool = False
    """As ``sliced``, of the pictures that weigh most, see ``benchmarks/tradeoff_drawn.py``."""
    rule: str = ""
    """In between, layers of the prefix make steps of length ``rule_lr`` by this rule of ``benchmarks/study_rules.py``."""
    rule_lr: float = 1e-4
    supervision: str = ""
    """Of these steps, see ``benchmarks/tradeoff_local.py``."""
    averaged: bool = False
    """Layers enter the prefix with a moving average of their weights."""
    replays: int = 0
    """After an epoch whose prefix does not learn so many start from what it put out then, see ``benchmarks/tradeoff_replayed.py``."""
    annealed: bool = False
    """The learning rate of a layer reaches 0, by a cosine, when it enters the prefix (FreezeOut, Brock et al. 2017)."""
    hotter: bool = False
    """The learning rate of the layers behind the prefix grows with the inverse square root of their share."""
    drift: float = 0.0
    """See ``growth``."""

    def boundary(self, epoch: int, epochs: int, layers: int) -> int:
        done = (epoch / epochs - self.start) / (1 - self.start)
        if self.growth in ("none", "drift") or done < 0 or epoch >= self.thaw * epochs:
            return 0
        share = {"linear": done, "quadratic": 1 - (1 - done) ** 2, "exponential": 1 - math.exp(-5 * done), "jump": 1.0}[
            self.growth
        ]
        return min(math.floor(self.l_max * layers * share + 1e-9), layers - 1)

    def cut(self, step: int, boundary: int) -> int:
        """The first layer that learns in ``step``."""
        if self.sliced or self.drawn:
            return boundary
        if self.every and not self.rarer and not self.by_loss and (step + 1) % self.every == 0:
            return 0
        return boundary // 2 if self.nested and (step + 1) % (self.every // 2) == 0 else boundary


WAYS = {  # those that matter most first
    "SGD": Way(),
    **{f"SGD, {share:g} of the epochs": Way(epochs=share) for share in (0.875, 0.75, 0.625)},
    "frozen, linear": Way("linear"),
    "frozen, quadratic to 75 %": Way("quadratic", l_max=0.75),
    "1/4, quadratic": Way("quadratic", every=4),
    "1/4, linear": Way("linear", every=4),
    "1/4, jump at 3/8": Way("jump", start=0.375, every=4),
    "1/2, jump at 1/4": Way("jump", start=0.25, every=2),
    "1/2, jump at 0": Way("jump", every=2),
    "1/4, linear from 1/4 on": Way("linear", l_max=0.95, start=0.25, every=4),
    "1/3, quadratic": Way("quadratic", every=3),
    "1/8, quadratic": Way("quadratic", every=8),
    "1/4, quadratic, held": Way("quadratic", every=4, held=True),
    "1/4, linear, held": Way("linear", every=4, held=True),
    "1/4, linear, larger steps": Way("linear", every=4, power=1.0),
    "1/4 of each mini-batch, linear": Way("linear", every=4, sliced=True),
    "1/4 of each mini-batch, linear, twice the steps": Way("linear", every=4, sliced=True, power=0.5),
    "1/4 of each mini-batch, linear, four times the steps": Way("linear", every=4, sliced=True, power=1.0),
    "1/4 of each mini-batch, drawn by gradient, linear": Way("linear", every=4, drawn=True),
    "1/4 of each mini-batch, drawn by gradient, jump at 1/4 to 80 %": Way("jump", l_max=0.8, start=0.25, every=4, drawn=True),
    "frozen, jump at 5/8": Way("jump", start=0.625),
    "frozen, jump at 1/4 to 60 %, thawed at 7/8": Way("jump", l_max=0.6, start=0.25, thaw=0.875),
    "1/4 and 1/8, quadratic": Way("quadratic", every=8, nested=True),
    "1/4, exponential to 75 %": Way("exponential", l_max=0.75, every=4),
    "1/4, exponential to 75 %, held": Way("exponential", l_max=0.75, every=4, held=True),
    "frozen, linear, every second epoch replayed": Way("linear", replays=1),
    "frozen, linear, three of four epochs replayed": Way("linear", replays=3),
    "frozen, quadratic to 75 %, every second epoch replayed": Way("quadratic", l_max=0.75, replays=1),
    "frozen, jump at 5/8, every second epoch replayed": Way("jump", start=0.625, replays=1),
    "frozen, jump at 5/8, all further epochs replayed": Way("jump", start=0.625, replays=10**6),
    "frozen, jump at 5/8 to 75 %, all further epochs replayed": Way("jump", l_max=0.75, start=0.625, replays=10**6),
    "frozen, jump at 5/8 to 75 %, annealed, all further epochs replayed": Way(
        "jump", l_max=0.75, start=0.625, annealed=True, replays=10**6
    ),
    "frozen, jump at 3/4 to 75 %, annealed, all further epochs replayed": Way(
        "jump", l_max=0.75, start=0.75, annealed=True, replays=10**6
    ),
    "frozen, jump at 3/4, all further epochs replayed": Way("jump", start=0.75, replays=10**6),
    "frozen, linear, averaged": Way("linear", averaged=True),
    "frozen, linear, annealed": Way("linear", annealed=True),
    "frozen, linear, hotter": Way("linear", hotter=True),
    **{f"frozen, outputs within {share:g}": Way("drift", drift=share) for share in (0.1, 0.2, 0.3)},
    "1/1 and rarer, linear": Way("linear", every=1, rarer=True),
    "1/2 and rarer, linear": Way("linear", every=2, rarer=True),
    "1/4 by loss, linear": Way("linear", every=4, by_loss=True),
    **{
        f"1/4, linear, {rule} between": Way("linear", every=4, rule=rule)
        for rule in ("hebb", "per filter", "oja", "subspace", "centred")
    },
    **{
        f"{rule} {lr:g}, linear, {supervision}": Way("linear", rule=rule, rule_lr=lr, supervision=supervision)
        for rule, lr in (("hebb", 0.01), ("hebb", 0.001))
        for supervision in ("sign", "revert")
    },
}
