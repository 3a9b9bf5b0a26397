"""The traced layers against what is known of the networks."""

from __future__ import annotations

import pytest
from torch import Size

from benchmarks import networks
from benchmarks.networks import NETWORKS, kind, layers
from localsgd_ext.train import models

# Layers, and multiply-adds of one picture's forward in 10^9, as the papers and torchvision's documentation give them.
KNOWN = {
    "resnet18-cifar": (21, 0.56),
    "vgg13-cifar": (11, 0.23),
    "resnet34": (37, 3.66),
    "resnet50": (54, 4.09),
    "mobilenet_v2": (53, 0.30),
    "vit_b_16": (50, 16.85),  # torchvision's 17.56 counts attention's own products as well
    "convnext_tiny": (59, 4.46),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_and_multiply_adds(name: str) -> None:
    listed = layers(name, 2)
    count, giga = KNOWN[name]
    assert sum(layer.count for layer in listed) == count
    macs = sum(layer.count * layer.geometry.wgrad_flops for layer in listed) / 2 / 2 / 1e9  # of 2 pictures
    assert macs == pytest.approx(giga, rel=0.03)


@pytest.mark.parametrize("name", NETWORKS)
def test_names_tell_layers_apart(name: str) -> None:
    listed = [layer for batch in (2, 3) for layer in layers(name, batch)]
    assert len({layer.case.name for layer in listed}) == len({layer.case for layer in listed}) == len(listed)


def test_vit_has_the_products_of_attention() -> None:
    found = {layer.first: (layer.case.x, layer.case.weight, layer.count) for layer in layers("vit_b_16", 2)}
    prefix = "encoder.layers.encoder_layer_0.self_attention"
    assert found[f"{prefix}.in_proj"] == ((2, 197, 768), (2304, 768), 12)
    assert found[f"{prefix}.out_proj"] == ((2, 197, 768), (768, 768), 12)


def test_kinds() -> None:
    counted: dict[str, int] = {}
    for layer in layers("mobilenet_v2", 1):
        counted[kind(layer.case)] = counted.get(kind(layer.case), 0) + layer.count
    assert counted == {"dense": 1, "depthwise": 17, "contracting": 18, "expanding": 17}


def test_shapes_are_those_of_the_forward() -> None:
    for layer in layers("resnet18-cifar", 4):
        assert layer.z[0] == layer.case.x[0] == 4
        assert layer.z[-1 if layer.case.dims == 0 else 1] == layer.case.weight[0]
    assert layers("resnet18-cifar", 4)[-1].z == (4, 10)
    assert Size(layers("resnet18-cifar", 4)[0].z) == Size((4, 64, 32, 32))


def test_unknown_network() -> None:
    with pytest.raises(ValueError, match=r"network must be one of resnet18-cifar, .*, got 'alexnet'"):
        layers("alexnet", 1)


def test_every_network_of_the_command_line_is_there() -> None:
    assert {name.removesuffix("-cifar") for name in networks.NETWORKS} >= models.MODELS.keys() - {"small_resnet", "small_vgg"}
