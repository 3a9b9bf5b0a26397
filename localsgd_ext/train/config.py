"""What a run was asked to do, complete and checked: every value is here, so that a run can be told from its config alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from localsgd_ext.batch_growth import LR_SCALINGS
from localsgd_ext.freezing import BN_STATS
from localsgd_ext.learning import PRESETS as LIBRARY_PRESETS
from localsgd_ext.nonfinite import NAN_POLICIES
from localsgd_ext.reduction import Sync
from localsgd_ext.train import presets
from localsgd_ext.train.models import PRUNABLE, RESIDUAL

METHODS = ("sgd", "freeze", "refresh", "local", "local-paper", "stochastic-depth", "prunetrain")
NOT_PREFIX = ("sgd", "stochastic-depth", "prunetrain")
"""Those that treat all layers alike, without a boundary."""
NEED_BOUNDARY = ("refresh", "min_loss_drop", "bn_stats", "nan_policy", "memory_budget", "max_batch_size", "lr_scaling")
"""Options that only the other methods have."""
_IGNORED_ONCE = ("refresh", "min_loss_drop", "bn_stats")  # of them, in files of runs of other methods
HEBBIAN = ("local", "local-paper")
"""Those whose prefix is updated in the forward pass."""
ONE_PROCESS = ("stochastic-depth", "prunetrain")
"""Those whose network is not the same in every mini-batch, or changes in other ways than by what is frozen."""
DATA_SETS = ("digits", "glyphs", "cifar10", "cifar100", "imagenet", "fake")
LR_SCHEDULES = ("step", "cosine", "constant")
SCHEDULES = ("dynamic", "quadratic", "linear", "exponential", "local-first")
SUPERVISIONS = ("absolute", "toggle", "none")
AMP = ("none", "bf16", "fp16")
BAD_IMAGES = ("report", "raise")

# May change between a run and its resumption: where the files are, who reads them and what stops it, not what is computed.
_INCIDENTAL = frozenset({"root", "workers", "bad_images"})
_WITH_PREFIX = "one of the methods " + ", ".join(method for method in METHODS if method not in NOT_PREFIX)
_HYPERPARAMETERS = tuple(f.name for f in dataclasses.fields(presets.Hyperparameters))


@dataclass(frozen=True)
class RunConfig:
    """One training run. Build it with :func:`resolve`. Raises ``ValueError`` that names the option at fault."""

    data: str
    model: str
    method: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    lr_schedule: str
    lr_step: int
    lr_gamma: float
    local_lr: float
    local_lr_decay: float
    local_lr_decay_every: int
    alpha: float
    l_max: float
    t_shift: int | float | str = "auto"
    schedule: str = "dynamic"
    supervision: str = "absolute"
    sample: float = 1.0
    refresh: int = 0
    min_loss_drop: float | None = None
    """``None``: the library's, but Algorithm 1 as printed for ``local-paper`` and the paper's preset."""
    bn_stats: str = "update"
    nan_policy: str = "report"
    memory_budget: int | None = None
    """Bytes, of each device. ``None``: the batch does not grow."""
    max_batch_size: int | None = None
    lr_scaling: str = "none"
    sync: Sync = "step"
    survival: float = 0.5
    lasso_ratio: float = 0.2
    reconfigure_every: int = 10
    preset: str | None = None
    seed: int = 0
    train_size: int | None = None
    test_size: int | None = None
    image_size: int | None = None
    channels_last: bool = False
    amp: str = "none"
    deterministic: bool = False
    device: str = "cpu"
    root: str | None = None
    workers: int = 4
    bad_images: str = "report"

    def __post_init__(self) -> None:
        for name, choices in (
            ("data", DATA_SETS),
            ("method", METHODS),
            ("lr_schedule", LR_SCHEDULES),
            ("schedule", SCHEDULES),
            ("supervision", SUPERVISIONS),
            ("bn_stats", BN_STATS),
            ("nan_policy", NAN_POLICIES),
            ("lr_scaling", tuple(LR_SCALINGS)),
            ("amp", AMP),
            ("bad_images", BAD_IMAGES),
            ("preset", ("paper", None)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(str(c) for c in choices if c)
                raise ValueError(f"--{flag(name)} must be one of {listed}, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "lr_step", "local_lr_decay_every", "reconfigure_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("train_size", "test_size", "image_size"):
            _require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "lr_gamma", "local_lr_decay", "alpha"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("weight_decay", "local_lr"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _require(self, "sample", 0 < self.sample <= 1, "in (0, 1]")
        _require(self, "refresh", self.refresh >= 0, "at least 0")
        _require(self, "min_loss_drop", self.min_loss_drop is None or 0 <= self.min_loss_drop < 1, "in [0, 1)")
        if self.schedule == "local-first" and self.min_loss_drop:
            raise ValueError(
                f"--min-loss-drop {self.min_loss_drop} cannot wait with --schedule local-first, which begins with local layers"
            )
        _require(self, "survival", 0 < self.survival <= 1, "in (0, 1]")
        _require(self, "lasso_ratio", 0 < self.lasso_ratio < 1, "in (0, 1)")
        _require(self, "l_max", 0 < self.l_max < 1, "in (0, 1)")
        _require(self, "seed", self.seed >= 0, "at least 0")
        _require(self, "workers", self.workers >= 0, "at least 0")
        if isinstance(self.t_shift, str):
            _require(self, "t_shift", self.t_shift == "auto", "a number of layers, a fraction of the depth, or auto")
        else:
            _require(self, "t_shift", self.t_shift > 0, "positive")
        self._check_batch_growth()
        if self.method in NOT_PREFIX and self.nan_policy != "report":
            raise ValueError(f"--nan-policy {self.nan_policy} needs {_WITH_PREFIX}; got --method {self.method}")
        a_number = isinstance(self.sync, int) and not isinstance(self.sync, bool) and self.sync >= 1
        _require(
            self, "sync", self.sync in ("step", "epoch") or a_number, "step, epoch or a number of mini-batches, at least 1"
        )
        if self.method not in HEBBIAN and self.sync != "step":
            raise ValueError(
                f"--sync {self.sync} says when local updates are summed over processes, for --method {' or '.join(HEBBIAN)}; "
                f"got --method {self.method}"
            )
        if self.method in HEBBIAN and self.bn_stats == "fold":
            raise ValueError(
                f"--bn-stats fold needs a prefix that makes no local updates: --method freeze or refresh; got --method {self.method}"
            )
        if self.method == "refresh":
            _require(self, "refresh", self.refresh >= 1, "at least 1 for --method refresh")
        if self.method == "stochastic-depth" and self.model not in RESIDUAL:
            known = ", ".join(RESIDUAL)
            raise ValueError(
                f"--method stochastic-depth needs a network with residual blocks: {known}; got --model {self.model}"
            )
        if self.method == "prunetrain" and self.model not in PRUNABLE:
            raise ValueError(f"--method prunetrain needs one of the networks {', '.join(PRUNABLE)}; got --model {self.model}")
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ValueError(f"--amp fp16 needs a CUDA device, got --device {self.device}; use --amp bf16")

    def _check_batch_growth(self) -> None:
        if self.memory_budget is None:
            for name, default in (("max_batch_size", None), ("lr_scaling", "none")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"--{flag(name)} {getattr(self, name)} needs --memory-budget, without which the batch does not grow"
                    )
            return
        whole = isinstance(self.memory_budget, int) and not isinstance(self.memory_budget, bool)
        _require(self, "memory_budget", whole and self.memory_budget >= 1, "a whole number of bytes, at least 1")
        if self.max_batch_size is not None:
            _require(self, "max_batch_size", self.max_batch_size >= self.batch_size, f"at least --batch-size {self.batch_size}")
        if self.method in NOT_PREFIX:
            raise ValueError(
                f"--memory-budget needs {_WITH_PREFIX}, whose boundary frees memory for the batch; got --method {self.method}"
            )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: object) -> RunConfig:
        """Raises ``ValueError`` for JSON that is not a run's configuration."""
        if not isinstance(value, dict):
            raise ValueError(f"a run's configuration must be a JSON object, got {type(value).__name__}")
        unknown = sorted(value.keys() - {f.name for f in dataclasses.fields(cls)})
        missing = sorted({f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING} - value.keys())
        if unknown or missing:
            raise ValueError(f"not a run's configuration: unknown fields {unknown}, missing fields {missing}")
        return cls(**value)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers that come out."""
        return {name: value for name, value in self.to_json().items() if name not in _INCIDENTAL}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Of the options that have one."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}

    def replace(self, **changes: Any) -> RunConfig:
        return dataclasses.replace(self, **changes)


def resolve(data: str, model: str, method: str, preset: str | None = None, **flags: Any) -> RunConfig:
    """Complete the flags that were given (``None`` = not given): defaults, overridden by the preset, overridden by flags."""
    if preset not in (None, "paper"):
        raise ValueError(f"--preset must be paper, got {preset!r}")
    base = presets.paper(data, model) if preset == "paper" else presets.DEFAULTS
    values = {name: getattr(base, name) for name in _HYPERPARAMETERS}
    if method == "refresh":
        values |= {name: LIBRARY_PRESETS["refresh"][name] for name in ("schedule", "l_max", "refresh")}
    if method == "local-paper":
        values |= {"local_lr": 0.01, "local_lr_decay": presets.paper_local_lr_decay(data), "local_lr_decay_every": 30}
    values |= {name: value for name, value in flags.items() if value is not None}
    for name in _IGNORED_ONCE if method in NOT_PREFIX else ():
        if (asked := values.pop(name, None)) and asked != RunConfig.defaults()[name]:
            raise ValueError(f"--{flag(name)} {flags[name]} needs {_WITH_PREFIX}; got --method {method}")
    values.setdefault("reconfigure_every", max(1, values["epochs"] // 9))  # the paper's 10 of 90 epochs
    return RunConfig(data=data, model=model, method=method, preset=preset, **values)


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """The options in which two configurations differ and that matter, as ``--flag: saved -> asked``."""
    old, new = saved.identity(), asked.identity()
    return [f"--{flag(name)}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def flag(name: str) -> str:
    """The option that sets a field, without its dashes."""
    return name.replace("_", "-")


def _require(config: RunConfig, name: str, holds: bool, requirement: str) -> None:
    if not holds:
        raise ValueError(f"--{flag(name)} must be {requirement}, got {getattr(config, name)}")
