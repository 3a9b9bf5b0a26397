"""What the arguments of LocalizedLearning may be, and what stands for those that are not given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType
from typing import Any

from .checks import answer
from .freezing import BN_STATS
from .refresh import Every
from .selection import DynamicModeSelection, ModeSelection, StaticModeSelection
from .supervision import WeakSupervision
from .updater import Activation, check_update

RULES = ("hebbian", "frozen")
AUTO = "auto"
PRESETS: dict[str, dict[str, Any]] = {
    # What keeps most of SGD's accuracy for its cost (benchmarks/TRADEOFF.md). The Hebbian step is not in it: it was not seen to help.
    # Its normalised step has the length lr whatever the size of the weight; 0.01, the paper's, overwrites trained filters on
    # networks of ordinary width, 1e-4 stays within reach of freezing.
    "default": {"rule": "frozen", "schedule": "dynamic", "l_max": 0.75, "min_loss_drop": 0.1, "refresh": None, "lr": 1e-4},
    "refresh": {"rule": "frozen", "schedule": "linear", "l_max": 0.9, "min_loss_drop": 0.1, "refresh": 4, "lr": 1e-4},
    "paper": {"rule": "hebbian", "schedule": "dynamic", "l_max": 0.75, "min_loss_drop": 0.0, "refresh": None, "lr": 0.01},
}
"""What is taken for arguments that are not given; for ``preset=None`` the first. ``lr`` counts for the Hebbian rule only."""


class LocalRate:
    """The local learning rate of each epoch.

    Args:
        lr: a number, which is divided by ``decay`` every ``decay_every`` epochs, or a callable of the epoch.
    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, lr: float | Callable[[int], float], decay: float, decay_every: int) -> None:
        if not decay >= 1:  # so that NaN is refused
            raise ValueError(f"lr_decay must be at least 1, got {decay}")
        if decay_every < 1:
            raise ValueError(f"lr_decay_every must be at least 1, got {decay_every}")
        if not callable(lr) and not (lr >= 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be finite and at least 0, got {lr}")
        self._lr, self._decay, self._decay_every = lr, decay, decay_every

    def at(self, epoch: int) -> float:
        """Of ``epoch``.

        Raises:
            TypeError: a callable's answer is no number.
            ValueError: it is negative or not finite.
        """
        if callable(self._lr):
            rate = answer("lr", self._lr, epoch)
            if not (rate >= 0 and math.isfinite(rate)):
                raise ValueError(f"lr({epoch}) must be finite and at least 0, got {rate}")
            return rate
        return float(self._lr / self._decay ** (epoch // self._decay_every))


@dataclass(frozen=True)
class Choices:
    """What the arguments of ``LocalizedLearning`` come to, those not given included."""

    rule: str
    rate: LocalRate
    schedule: ModeSelection
    supervision: WeakSupervision | None
    refresh: Every | None
    sample: float


def choose(
    *,
    epochs: int,
    preset: str | None,
    schedule: str | ModeSelection | None,
    alpha: float | None,
    l_max: float | None,
    t_shift: int | float | str | None,
    min_loss_drop: float | None,
    rule: str | None,
    lr: float | Callable[[int], float] | None,
    lr_decay: float,
    lr_decay_every: int,
    supervision: str | WeakSupervision | None,
    normalize: bool,
    activation: Activation | None,
    momentum: float,
    sample: float,
    algorithm: str,
    refresh: Every | str | None,
    bn_stats: str,
    on_boundary_move: Callable[[int, int], None] | None,
) -> Choices:
    """Check the arguments of ``LocalizedLearning`` that are its own, and fill in its presets.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """
    given: tuple[tuple[str, Any, Any, str], ...] = (
        ("epochs", epochs, Integral, "an int"),
        ("lr_decay", lr_decay, Real, "a number"),
        ("lr_decay_every", lr_decay_every, Integral, "an int"),
        ("lr", lr, (NoneType, Real, Callable), "a number, a callable of the epoch or None"),
        ("supervision", supervision, (NoneType, str, WeakSupervision), "a name, a WeakSupervision or None"),
        ("on_boundary_move", on_boundary_move, (NoneType, Callable), "callable or None"),
    )
    for name, value, types, wanted in given:
        if isinstance(value, bool) or not isinstance(value, types):
            raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be None or one of {', '.join(PRESETS)}, got {preset!r}")
    check_update(normalize=normalize, activation=activation, momentum=momentum, sample=sample, algorithm=algorithm)
    chosen = PRESETS[preset or "default"]
    if rule is None and chosen["rule"] == "frozen":
        of_the_rule = (
            ("lr", lr, None),
            ("lr_decay", lr_decay, 2.0),
            ("lr_decay_every", lr_decay_every, 30),
            ("normalize", normalize, True),
            ("activation", activation, None),
            ("momentum", momentum, 0.0),
            ("sample", sample, 1.0),
            ("algorithm", algorithm, "auto"),
            ("supervision", supervision, None if supervision is None else AUTO),
        )
        for name, value, default in of_the_rule:
            if value != default:
                raise ValueError(
                    f"{name} needs rule='hebbian', got {name}={value!r} and no rule, which is 'frozen' then (to leave {name} out of "
                    "account give rule='frozen')"
                )
    rule = chosen["rule"] if rule is None else rule
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if bn_stats not in BN_STATS:
        raise ValueError(f"bn_stats must be one of {', '.join(BN_STATS)}, got {bn_stats!r}")
    if bn_stats == "fold" and rule == "hebbian":
        raise ValueError(
            "bn_stats must be 'update' or 'freeze' with rule='hebbian', got 'fold': local layers learn from their own output, "
            "and their weights move in every mini-batch"
        )
    if supervision == AUTO:
        supervision = "absolute" if rule == "hebbian" else None
    if isinstance(supervision, WeakSupervision) and supervision.last_loss is not None:
        raise ValueError(f"supervision must be new, got {supervision!r} of another run: make one, or give its name")
    hyperparameters = {"alpha": alpha, "l_max": l_max, "t_shift": t_shift, "min_loss_drop": min_loss_drop}
    every: Any = chosen["refresh"] if refresh == AUTO else refresh  # Refresh checks it
    return Choices(
        rule=rule,
        rate=LocalRate(chosen["lr"] if lr is None else lr, lr_decay, lr_decay_every),
        schedule=_schedule(schedule, chosen, {name: value for name, value in hyperparameters.items() if value is not None}),
        supervision=WeakSupervision(supervision) if isinstance(supervision, str) else supervision,
        refresh=every,
        sample=float(sample),
    )


def _schedule(schedule: str | ModeSelection | None, preset: Mapping[str, Any], given: Mapping[str, Any]) -> ModeSelection:
    """``schedule``, or the one of this name, of the hyper-parameters that are ``given`` and the preset's others."""
    if isinstance(schedule, ModeSelection):
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name} must not be given beside a schedule that is a ModeSelection, got {value!r}: give it to {type(schedule).__name__}"
            )
        if schedule.epoch > 0:
            raise ValueError(
                f"schedule must be new, got {schedule!r}, which has seen {schedule.epoch} epochs of another run: make one"
            )
        return schedule
    kind = preset["schedule"] if schedule is None else schedule
    shared = {name: given.get(name, preset[name]) for name in ("l_max", "min_loss_drop")}
    dynamic = DynamicModeSelection(**{name: given[name] for name in ("alpha", "t_shift") if name in given}, **shared)
    if kind == "dynamic":
        return dynamic
    if kind in StaticModeSelection.KINDS:  # the others' hyper-parameters have been checked
        return StaticModeSelection(kind=kind, **shared)
    known = ", ".join(("dynamic", *StaticModeSelection.KINDS))
    raise ValueError(f"schedule must be one of {known} or a ModeSelection, got {kind!r}")
