from __future__ import annotations

import pytest
import torch

from localsgd_ext import trace_layers
from localsgd_ext.train import models

# name: (side of the picture, conv and linear layers)
LAYERS = {
    "small_resnet": (32, 14),
    "small_vgg": (32, 9),  # eight convolutions and one linear layer
    "resnet18": (32, 21),  # 17 convolutions, 3 in shortcuts, 1 linear
    "vgg13": (32, 11),  # ten convolutions and one linear layer
    "resnet34": (64, 37),
    "resnet50": (64, 54),
    "mobilenet_v2": (64, 53),
}


@pytest.mark.parametrize("name", LAYERS)
def test_forms(name: str) -> None:
    size, layers = LAYERS[name]
    model = models.build(name, num_classes=7, seed=0)
    x = torch.randn(2, 3, size, size)
    assert len(trace_layers(model, x)) == layers
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 7)


def test_every_model_is_listed_here() -> None:
    assert models.MODELS.keys() == LAYERS.keys()


def test_cifar_forms_keep_the_resolution_at_the_stem() -> None:
    model = models.build("resnet18", 10, seed=0)
    stem = torch.nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)  # type: ignore[arg-type]
    assert stem(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (models.build("small_resnet", 10, seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["0.0.weight"], other["0.0.weight"])


def test_timm() -> None:
    model = models.build("timm:resnet10t", num_classes=5, seed=0).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lenet", "--model must be one of small_resnet, small_vgg, resnet18, .*or timm:NAME, got 'lenet'"),
        ("timm:resnet5000", r"--model timm:resnet5000: timm .* has no such model"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, 10, seed=0)


def test_timm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--model timm:vit_tiny needs timm: pip install timm"):
        models.build("timm:vit_tiny", 10, seed=0)
