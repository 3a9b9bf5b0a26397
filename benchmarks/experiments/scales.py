"""How large the experiments are: from seconds on a CPU, which tests run, to the paper's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from benchmarks.experiments.cells import Cell, Network, Variant
from localsgd_ext.train.compare import options_for
from localsgd_ext.train.config import METHODS, RunConfig, resolve
from localsgd_ext.train.presets import PAPER


@dataclass(frozen=True)
class Scale:
    """``imagenet`` and ``cifar`` are the networks that stand in for the paper's of these data sets, the most used one first."""

    name: str
    imagenet: tuple[Network, ...]
    cifar: tuple[Network, ...]
    flags: Mapping[str, Any]
    seeds: int
    pareto_seeds: int
    preset: str | None = None
    grid_shifts: tuple[int | float, ...] = (1, 2)
    """Of ``t_shift``; in layers for shallow networks, where small shares of the depth are all one layer."""
    sweep_shifts: tuple[int | float, ...] = (1, 2, 3, 4, 6)
    devices: int = 1
    """That share the mini-batches of table 3: processes, each with a core or a GPU of its own."""
    device_memory: int = 0
    """Bytes of each, which the batch of the first network of ``imagenet`` may fill; where it is not the paper's: what SGD needs, and a
    little, so that twice the batch does not fit at the start."""


_SMALL = (("glyphs", "small_resnet"), ("glyphs", "small_vgg"))
_LARGE = (("glyphs", "resnet18"), ("glyphs", "vgg13"))
_FAKE = (("fake", "small_resnet"), ("fake", "small_vgg"))
_CUDA = {"device": "cuda", "channels_last": True, "amp": "bf16"}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            _FAKE,
            _FAKE,
            {
                "train_size": 64, "test_size": 40, "image_size": 8, "batch_size": 16, "epochs": 4, "lr": 0.02, "alpha": 9.0,
                "min_loss_drop": 0.0, "device": "cpu"
            },
            seeds=2,
            pareto_seeds=2,
            devices=2,
            device_memory=3_000_000,
        ),
        # SGD is more accurate at this rate than at 0.01 (the default of localsgd train) and at 0.1, on both networks.
        Scale(
            "cpu",
            _SMALL,
            _SMALL,
            {"train_size": 4000, "test_size": 2000, "epochs": 16, "lr": 0.03, "device": "cpu", "channels_last": True},
            seeds=3,
            pareto_seeds=10,
            devices=2,
            device_memory=20_000_000,
        ),
        Scale(
            "gpu",
            _LARGE,
            _LARGE,
            {"train_size": 50_000, "test_size": 10_000, "epochs": 30, "batch_size": 64, "lr": 0.05, **_CUDA},
            seeds=3,
            pareto_seeds=3,
            device_memory=450_000_000,  # what SGD needs as counted on a CPU, 419 MB, and a little; not tried on a GPU yet
        ),
        Scale(
            "full",
            tuple(("imagenet", model) for model in ("resnet50", "resnet34", "mobilenet_v2")),
            tuple((data, model) for data in ("cifar10", "cifar100") for model in ("resnet18", "vgg13")),
            {"device": "cuda", "channels_last": True},
            seeds=1,
            pareto_seeds=3,
            preset="paper",
            grid_shifts=(0.05, 0.1),
            sweep_shifts=(0.02, 0.05, 0.08, 0.12, 0.2, 0.3),
            devices=4,
            device_memory=10 * 10**9,
        ),
    )
}  # fmt: skip


SAID_ELSEWHERE = {
    "data": "--data", "model": "--models", "root": "--root", "seed": "--seeds", "preset": "--scale", "method": "the experiment"
}  # fmt: skip
"""Options of a run that ``flags`` cannot set, and what does."""


@dataclass(frozen=True)
class Study:
    """A scale as it was asked for: ``data`` instead of its own data sets, ``flags`` over its options, ``seeds`` instead of its number.
    Raises ``ValueError`` for flags that it cannot take, and for fewer seeds than one."""

    scale: Scale
    data: str | None = None
    root: str | None = None
    models: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    seeds: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        types = get_type_hints(RunConfig)
        for name, value in self.flags.items():
            if name in SAID_ELSEWHERE:
                raise ValueError(f"--set cannot say {name}, {SAID_ELSEWHERE[name]} does; got {name}={value}")
            allowed = {*get_args(types[name])} or {types[name]}
            allowed |= {int} if float in allowed else set()
            if type(value) not in allowed:
                named = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in allowed))
                raise ValueError(f"--set {name} must be of type {named}, got {value!r}")

    def networks(self, role: str) -> tuple[Network, ...]:
        """Those that stand for the paper's of ``role``: ``"imagenet"`` or ``"cifar"``."""
        networks: tuple[Network, ...] = getattr(self.scale, role)
        if self.data is not None:
            of_paper = tuple((data, model) for data, model in PAPER if data == self.data)
            if self.scale.preset is None or not of_paper:  # the scale's networks on other pictures
                of_paper = tuple(dict.fromkeys((self.data, model) for _, model in networks))
            networks = of_paper
        return tuple(network for network in networks if not self.models or network[1] in self.models)

    def seed_range(self, *, pareto: bool = False) -> range:
        return range(self.seeds if self.seeds is not None else self.scale.pareto_seeds if pareto else self.scale.seeds)

    def asked_seeds(self, *, pareto: bool = False) -> int | None:
        """Their number, where it is not the scale's."""
        return self.seeds if self.seeds not in (None, self.scale.pareto_seeds if pareto else self.scale.seeds) else None

    def config(self, network: Network, method: str, seed: int = 0, **flags: Any) -> RunConfig:
        """Raises ``ValueError`` for options that make no run."""
        data, model = network
        values = {**self.scale.flags, **self.flags, **flags}
        if data not in ("digits", "fake", "imagenet"):
            values.pop("image_size", None)
        values = options_for(method, METHODS, values)  # `--set bn_stats=freeze` is not for SGD
        return resolve(data, model, method, self.scale.preset, seed=seed, root=self.root, **values)

    def cell(self, network: Network, variant: Variant, seed: int) -> Cell:
        """Raises ``ValueError`` for options that make no run; a method that is not for this network is missing there."""
        if variant.method not in METHODS:
            return Cell(network, variant, seed, None, f"localsgd_ext.train has no method {variant.method} yet")
        for method in ("sgd", "freeze"):  # whatever is wrong with the options shows here already; SGD leaves some out
            self.config(network, method, seed)
        try:
            return Cell(network, variant, seed, self.config(network, variant.method, seed, **variant.flags))
        except ValueError as error:
            return Cell(network, variant, seed, None, str(error))

    def epochs(self, network: Network) -> int:
        """Of a run of SGD."""
        return self.config(network, "sgd").epochs

    def shortened(self, network: Network, epochs: int) -> dict[str, Any]:
        """The options of SGD with fewer epochs, whose learning rate makes all its steps in them."""
        whole = self.config(network, "sgd")
        lr_step = max(1, round(whole.lr_step * epochs / whole.epochs))
        return {"epochs": epochs, **({"lr_step": lr_step} if whole.lr_schedule == "step" else {})}
