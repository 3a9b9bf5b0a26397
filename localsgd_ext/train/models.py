"""The networks of the paper's section 3, two small ones for CPUs, and any of timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel, with channels of zeros after those that there are."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.outputs - self.inputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2015, section 4.2, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = PadShortcut(inputs, outputs, stride)

    def branch(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class SmallResNet(nn.Sequential):
    """ResNet-14: a stem, three stages of two blocks 16, 32 and 64 channels wide, a linear layer: 14 layers in all."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2) -> None:
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        layers: list[nn.Module] = [stem]
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


class SmallVGG(nn.Sequential):
    """VGG-9: four stages of two convolutions 16, 32, 64 and 128 channels wide, max pooling between, a linear layer: 9 in all."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 128), convolutions: int = 2) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for stage, outputs in enumerate(widths):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def _cifar_resnet18(num_classes: int) -> nn.Module:
    from torchvision.models import resnet18

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the 7x7 stride-2 stem would leave 32x32 pictures 1x1
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return cast(nn.Module, model)


def _cifar_vgg13(num_classes: int) -> nn.Module:
    from torchvision.models import vgg13_bn

    features = vgg13_bn(num_classes=1).features  # five halvings: 32x32 becomes 1x1
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        from torchvision.models import get_model

        model: nn.Module = get_model(name, weights=None, num_classes=num_classes)
        return model

    return build


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "small_vgg": SmallVGG,
    "resnet18": _cifar_resnet18,  # CIFAR form
    "vgg13": _cifar_vgg13,  # CIFAR form, with BatchNorm
    "resnet34": _torchvision("resnet34"),
    "resnet50": _torchvision("resnet50"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
}

RESIDUAL = ("small_resnet", "resnet18", "resnet34", "resnet50", "mobilenet_v2")
"""Those with residual blocks, whose branches stochastic depth can drop."""

PRUNABLE = tuple(MODELS)
"""Those known to come out right when channels are removed; any of timm's may hold what is not."""


def build(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network; the same seed gives the same weights. Raises ``ValueError`` for an unknown name."""
    check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name.removeprefix("timm:"), pretrained=False, num_classes=num_classes)
        return MODELS[name](num_classes)


def check_name(name: str) -> None:
    """Raises ``ValueError`` for a name that :func:`build` does not know."""
    if not name.startswith("timm:"):
        if name not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, or timm:NAME, got {name!r}")
        return
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(f"--model {name} needs timm: pip install timm") from None
    if not timm.is_model(name.removeprefix("timm:")):
        near = ", ".join(timm.list_models(f"*{name.removeprefix('timm:').split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"--model {name}: timm {timm.__version__} has no such model (near it: {near})")
