"""The layers of real networks, traced: shapes and how often they occur, for a batch size.

``python benchmarks/networks.py`` prints them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # in the place of this directory, whose modules are the package's
    sys.path[:1] = [str(Path(__file__).resolve().parents[1] / where) for where in (".", "tests")]

import torch
from cases import Case
from torch import Tensor, nn

from localsgd_ext.layers import LAYER_TYPES
from localsgd_ext.roofline import Geometry
from localsgd_ext.train import models


@dataclass(frozen=True)
class Network:
    name: str
    build: Callable[[], nn.Module]
    image: int
    batches: tuple[int, ...]


def _own(name: str, classes: int) -> Callable[[], nn.Module]:
    return lambda: models.MODELS[name](classes)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import get_model

        return get_model(name, weights=None)

    return build


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet18-cifar", _own("resnet18", 10), 32, (64, 256)),
        Network("vgg13-cifar", _own("vgg13", 10), 32, (64, 256)),
        Network("resnet34", _own("resnet34", 1000), 224, (64,)),
        Network("resnet50", _own("resnet50", 1000), 224, (64,)),
        Network("mobilenet_v2", _own("mobilenet_v2", 1000), 224, (64,)),
        Network("vit_b_16", _torchvision("vit_b_16"), 224, (64,)),
        Network("convnext_tiny", _torchvision("convnext_tiny"), 224, (64,)),
    )
}
DEFAULT_NETWORKS = tuple(name for name in NETWORKS if name != "convnext_tiny")


@dataclass(frozen=True)
class Layer:
    """A distinct layer; ``count`` is how often it occurs in its network, ``first`` the name of its first occurrence."""

    case: Case
    count: int
    first: str

    @property
    def z(self) -> tuple[int, ...]:
        return output_shape(self.case)

    @property
    def geometry(self) -> Geometry:
        return geometry(self.case)


@cache
def output_shape(case: Case) -> tuple[int, ...]:
    x, weight = (torch.empty(shape, device="meta") for shape in (case.x, case.weight))
    return tuple(case.forward(x, weight, None).shape)


def geometry(case: Case) -> Geometry:
    return Geometry(case.x, output_shape(case), case.weight, case.groups)


def layers(network: str, batch: int) -> tuple[Layer, ...]:
    """The network's distinct layers in execution order, traced on the meta device."""
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    chosen = NETWORKS[network]
    with torch.device("meta"):
        model = chosen.build()
        picture = torch.empty(batch, 3, chosen.image, chosen.image)
    calls: list[tuple[str, Case]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], _output: Any, name: str) -> None:
        calls.extend((name + suffix, case) for suffix, case in _cases(module, tuple(inputs[0].shape)))

    for name, module in model.named_modules():
        if isinstance(module, (*LAYER_TYPES, nn.MultiheadAttention)):
            module.register_forward_hook(lambda m, i, o, name=name: record(m, i, o, name))
    model.train()(picture)  # in eval mode, attention has a fast path without modules
    counts = Counter(case for _, case in calls)
    first = {case: name for name, case in reversed(calls)}
    return tuple(Layer(replace(case, name=describe(case)), count, first[case]) for case, count in counts.items())


def _cases(module: nn.Module, x: tuple[int, ...]) -> list[tuple[str, Case]]:
    if isinstance(module, nn.MultiheadAttention):
        # Its two products are functional calls. HebbianUpdater does not hook them; as shapes they belong to the network.
        width = module.embed_dim
        return [
            (".in_proj", Case("", x, (3 * width, width), bias=module.in_proj_bias is not None)),
            (".out_proj", Case("", x, (width, width), bias=module.out_proj.bias is not None)),
        ]
    assert isinstance(module.weight, Tensor)
    weight, bias = tuple(module.weight.shape), module.bias is not None
    if isinstance(module, nn.Linear):
        return [("", Case("", x, weight, bias=bias))]
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    arguments = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    return [("", Case("", x, weight, bias=bias, **arguments))]


def describe(case: Case) -> str:
    """``64->256 1x1 @56x56 b64``; ``s2``: stride; ``dw``: depthwise. Distinct for distinct layers of the networks here."""
    inputs = case.weight[1] * case.groups
    if case.dims == 0:
        rows = torch.Size(case.x[:-1]).numel()
        return f"linear {inputs}->{case.weight[0]} x{rows}{'+b' if case.bias else ''}"
    kernel = "x".join(map(str, case.weight[2:]))
    stride = case.stride if isinstance(case.stride, int) else case.stride[0]
    groups = " dw" if case.depthwise else f" g{case.groups}" if case.groups > 1 else ""
    size = "x".join(map(str, case.x[2:]))
    return f"{inputs}->{case.weight[0]} {kernel}{f' s{stride}' if stride > 1 else ''}{groups} @{size} b{case.x[0]}" + (
        "+b" if case.bias else ""
    )


KINDS = ("expanding", "square", "contracting", "depthwise", "dense")


def kind(case: Case) -> str:
    """``expanding`` (K >= 2C), ``square`` (C <= K < 2C) and ``contracting`` 1x1 or linear layers, ``depthwise``, ``dense``."""
    if case.depthwise:
        return "depthwise"
    if not case.pointwise:
        return "dense"
    outputs, inputs = case.weight[0], case.weight[1] * case.groups
    return "expanding" if outputs >= 2 * inputs else "square" if outputs >= inputs else "contracting"


if __name__ == "__main__":
    for network in NETWORKS.values():
        for batch in network.batches:
            listed = layers(network.name, batch)
            print(f"{network.name}, batch {batch}: {sum(layer.count for layer in listed)} layers, {len(listed)} distinct")
            for layer in listed:
                print(f"  {layer.count:3} x {layer.case.name:32} {kind(layer.case):12} {layer.first}")
