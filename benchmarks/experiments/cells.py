"""A cell is one training run: a variant (a method with its options) of one network with one seed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localsgd_ext.train.config import RunConfig

Network = tuple[str, str]
"""Data set and model."""


@dataclass(frozen=True)
class Variant:
    """What a table calls a row, and what it is: a method of ``localsgd_ext.train`` and the options in which it departs from the scale's."""

    label: str
    method: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    """That share every mini-batch, each on a device of its own."""


@dataclass(frozen=True)
class Cell:
    """``config`` is ``None`` where there is no such run yet; ``missing`` says why."""

    network: Network
    variant: Variant
    seed: int
    config: RunConfig | None
    missing: str = ""

    @property
    def name(self) -> str:
        """What ``--only`` is matched against."""
        return f"{self.network[0]}/{self.network[1]}/{self.variant.label}/seed{self.seed}"

    @property
    def key(self) -> str:
        """Names the run, see :func:`key_of`."""
        assert self.config is not None
        return key_of(self.config, self.variant.processes)


# Options that only some methods read: they do not tell runs of the others apart.
_WITH_BOUNDARY = ("freeze", "refresh", "local", "local-paper")
_READ_BY = {
    **dict.fromkeys(("alpha", "min_loss_drop", "l_max", "t_shift", "schedule", "refresh", "bn_stats"), _WITH_BOUNDARY),
    **dict.fromkeys(("local_lr", "local_lr_decay", "local_lr_decay_every", "supervision", "sample"), _WITH_BOUNDARY[2:]),
    "survival": ("stochastic-depth",),
    **dict.fromkeys(("lasso_ratio", "reconfigure_every"), ("prunetrain",)),
}


def digest(config: RunConfig) -> str:
    """Names a run: the same for all that compute the same numbers. Options at their default do not count, so that a new option
    leaves the names of runs that do without it as they were."""
    defaults = {f.name: f.default for f in dataclasses.fields(RunConfig) if f.default is not dataclasses.MISSING}
    telling = {
        name: value
        for name, value in config.identity().items()
        if config.method in _READ_BY.get(name, (config.method,)) and (name not in defaults or value != defaults[name])
    }
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:12]


def key_of(config: RunConfig, processes: int) -> str:
    """:func:`digest`, and the number of processes where there are several."""
    return digest(config) + (f"-{processes}" if processes > 1 else "")
