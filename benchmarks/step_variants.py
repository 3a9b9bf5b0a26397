"""The ways to train a network that benchmarks/step.py compares, and what each must compute: a step, its hooks, its MACs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning, StaticModeSelection, ops, reference
from localsgd_ext.hooks import Hook
from localsgd_ext.layers import ExecutionPlan
from localsgd_ext.sampling import sampled
from localsgd_ext.train import models

LOCAL_LR = 1e-6  # of no importance to the time, and the weights stay where they are
SAMPLES = {"local": 1.0, "local/2": 0.5, "local/4": 0.25, "local/8": 0.125}
BN_STATS = {"frozen": "update", "frozen eval": "freeze", "frozen fold": "fold"}
VARIANTS = ("sgd", *BN_STATS, "naive", *SAMPLES, "no-op")


@dataclass(frozen=True)
class Setting:
    """A network with the pictures it is trained on here; small ones, for a CPU."""

    model: str
    image: int
    batch: int
    classes: int


SETTINGS = {
    "resnet18": Setting("resnet18", 32, 32, 10),
    "vgg13": Setting("vgg13", 32, 32, 10),
    "resnet50": Setting("resnet50", 96, 16, 1000),
    "mobilenet_v2": Setting("mobilenet_v2", 96, 16, 1000),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def example(setting: Setting, layout: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, 3, setting.image, setting.image, generator=generator)
    y = torch.randint(setting.classes, (setting.batch,), generator=generator)
    return x.to(memory_format=LAYOUTS[layout]), y


def network(setting: Setting, layout: str) -> nn.Module:
    return models.build(setting.model, setting.classes, seed=0).to(memory_format=LAYOUTS[layout]).train()


def geometry(module: nn.Module) -> dict[str, Any]:
    """The arguments that describe a layer to the operations."""
    if isinstance(module, nn.Linear):
        return {}
    return {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}


@dataclass
class Variant:
    """One model being trained in one way. ``hook_seconds`` is what the last forward spent in the hooks of its layers."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning: LocalizedLearning | None = None
    hook_seconds: float = 0.0
    handles: list[Any] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Seconds by phase; ``hooks`` are a part of ``forward``. Dropout drops the same in every variant."""
        torch.manual_seed(0)
        clock = time.perf_counter
        self.hook_seconds = 0.0
        with no_kernel() if self.name == "no-op" else _nothing():
            start = clock()
            loss = F.cross_entropy(self.model(x), y)
            forward = clock()
        loss.backward()
        backward = clock()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = clock()
        return {
            "forward": forward - start,
            "hooks": self.hook_seconds,
            "backward": backward - forward,
            "optimizer": end - backward,
            "step": end - start,
        }

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            start = time.perf_counter()
            function(*args)
            self.hook_seconds += time.perf_counter() - start

        return call


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def no_kernel() -> Iterator[None]:
    """The update does nothing: what is left is the hook."""
    original = ops.hebbian_update_
    ops.hebbian_update_ = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.hebbian_update_ = original


class NaiveHook(Hook):
    """The paper's formulation as a user would write it: the library's weight gradient, its norm, ``add_``."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    @torch.no_grad()
    def __call__(self, module: Any, args: tuple[Tensor, ...], z: Tensor) -> None:
        x, weight = args[0], module.weight
        if isinstance(module, nn.Linear):
            d = z.flatten(0, -2).t() @ x.flatten(0, -2)
        else:
            d = torch.ops.aten.convolution_backward(
                z, x, weight, None, module.stride, module.padding, module.dilation, False, [0] * (x.dim() - 2), module.groups,
                [False, True, False]
            )[1]  # fmt: skip
        weight.add_(d * (self.lr / torch.linalg.vector_norm(d)))


def make(name: str, start: nn.Module, x: Tensor, boundary: int, lr: float = LOCAL_LR, *, timed: bool = True) -> Variant:
    """``start`` copied, with ``boundary`` layers treated as ``name`` (one of ``VARIANTS``) says. ``timed``: hooks look at the clock."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    variant = Variant(name, model, optimizer)
    if name == "sgd":
        return variant
    local = name in SAMPLES or name == "no-op"
    variant.learning = LocalizedLearning(
        model,
        optimizer,
        epochs=2,
        schedule=StaticModeSelection(kind=lambda _epoch: boundary, l_max=0.99),
        rule="hebbian" if local else "frozen",
        lr=lr,
        sample=SAMPLES.get(name, 1.0),
        supervision=None,
        refresh=None,
        bn_stats=BN_STATS.get(name, "update"),
    )
    variant.learning.trace(x)
    if local and timed:
        updater: Any = variant.learning._updater
        for hook in updater._hooks.values():
            hook.update = variant.timed(hook.update)
    if name == "naive":
        for layer in variant.learning.local_layers:
            hook = NaiveHook(lr)
            variant.handles.append(model.get_submodule(layer).register_forward_hook(variant.timed(hook)))
    return variant


# ---- what a step must compute


@dataclass(frozen=True)
class Call:
    """A layer's operands in one training forward."""

    name: str
    module: Any
    x: Tensor
    z: Tensor
    macs: int
    dgrad: bool
    """Whether back-propagation needs the gradient of ``x``."""


def calls(variant: Variant, plan: ExecutionPlan, x: Tensor) -> list[Call]:
    """The layers' operands, recorded in a training forward."""
    recorded: list[Call] = []

    def record(name: str, module: Any, args: tuple[Tensor, ...], z: Tensor) -> None:
        macs = z.numel() * module.weight[0].numel()
        recorded.append(Call(name, module, args[0].detach(), z.detach(), macs, args[0].requires_grad))

    handles = [
        variant.model.get_submodule(name).register_forward_hook(lambda m, a, z, name=name: record(name, m, a, z))
        for name in plan.layers
    ]
    torch.manual_seed(0)
    try:
        variant.model(x)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def mac_counts(recorded: Sequence[Call], prefix: set[str], all_dgrads: Mapping[str, bool]) -> dict[str, float]:
    """Multiply-adds of a step of each variant; ``recorded`` is of a frozen prefix, ``all_dgrads`` of SGD."""
    forward = sum(call.macs for call in recorded)
    frozen = forward + sum(call.macs * (1 + call.dgrad) for call in recorded if call.name not in prefix)
    update = sum(call.macs for call in recorded if call.name in prefix)
    counts: dict[str, float] = {"sgd": forward + sum(call.macs * (1 + all_dgrads[call.name]) for call in recorded)}
    counts |= {**dict.fromkeys(BN_STATS, frozen), "no-op": frozen, "naive": frozen + update}
    return counts | {name: frozen + sample * update for name, sample in SAMPLES.items()}


def kernel(call: Call, sample: float) -> Callable[[], None]:
    """The update of one layer alone, of the first turn's images."""
    module = call.module
    x, z = sampled(module.weight, call.x, call.z, sample, 0)
    lr = torch.full((), LOCAL_LR, dtype=torch.float64, device=x.device)
    skipped = torch.zeros((), dtype=torch.int64, device=x.device)
    arguments = {"bias": module.bias, "z_is_output": True, "skipped": skipped, **geometry(module)}
    return lambda: ops.hebbian_update_(module.weight.detach(), x, z, lr, **arguments)


PARITY_LR = 1.0  # a step so long that fp32 weights lose nothing of it
ALLOWED = 2e-4


def parity(start: nn.Module, plan: ExecutionPlan, x: Tensor, y: Tensor, boundary: int) -> dict[str, float]:
    """One step of each variant against the reference: the largest relative error over the layers of the prefix, of the step they
    made; over the rest of the network, of the weights after SGD's step. With a folded prefix, of what it hands to the
    transition layer; an unfolded one is the reference."""
    prefix = plan.layers[:boundary]
    probe = make("frozen", start, x, boundary)
    recorded = {call.name: call for call in calls(probe, plan, x)}
    probe = make("frozen", start, x, boundary)
    probe.step(x, y)
    after_sgd = {name: p.detach() for name, p in probe.model.named_parameters() if p.requires_grad}
    before = {name: start.get_submodule(name).weight.detach() for name in prefix}  # type: ignore[union-attr]
    errors: dict[str, float] = {}
    for name in ("naive", *SAMPLES):
        trained = make(name, start, x, boundary, lr=PARITY_LR)
        trained.step(x, y)
        worst = 0.0
        for layer in prefix:
            call = recorded[layer]
            part = sampled(before[layer], call.x, call.z, SAMPLES.get(name, 1.0), 0)  # type: ignore[arg-type]
            d = reference.correlation(*part, before[layer], algorithm="library", **geometry(call.module))  # type: ignore[arg-type]
            made = trained.model.get_submodule(layer).weight.detach() - before[layer]  # type: ignore[operator]
            worst = max(worst, (made - d / d.norm()).norm().item())
        parameters = dict(trained.model.named_parameters())
        for parameter, expected in after_sgd.items():
            worst = max(worst, _distance(parameters[parameter].detach(), expected))
        errors[name] = worst
    folded, plain = (
        _input_of(plan.layers[boundary], make(name, start, x, boundary), x, y) for name in ("frozen fold", "frozen eval")
    )
    return {**errors, "frozen fold": _distance(folded, plain)}


def _input_of(layer: str, variant: Variant, x: Tensor, y: Tensor) -> Tensor:
    """What reaches ``layer`` in a step."""
    reached: list[Tensor] = []
    handle = variant.model.get_submodule(layer).register_forward_pre_hook(lambda _, args: reached.append(args[0].detach()))
    variant.step(x, y)
    handle.remove()
    return reached[0]


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
