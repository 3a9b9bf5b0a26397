"""Small networks for the tests of the training library: each shows one thing a prefix of local layers has to cope with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from localsgd_ext import LocalizedLearning, StaticModeSelection

Batch = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """A basic residual block. The shortcut is registered first but runs last, so registration order is not execution order."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        if stride != 1 or c_in != c_out:
            self.down: nn.Module | None = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.down_bn: nn.Module | None = nn.BatchNorm2d(c_out)
        else:
            self.down = self.down_bn = None
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.down is None or self.down_bn is None else self.down_bn(self.down(x))
        return F.relu(y + shortcut)


class TwoBlockResNet(nn.Module):
    """Stem, two residual blocks (the second with a strided shortcut), linear head: L = 7."""

    LAYERS = ("stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.down", "fc")

    def __init__(self, width: int = 4, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width + 2, classes)
        self.block2 = ResidualBlock(width, width + 2, 2)
        self.block1 = ResidualBlock(width, width)
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.block2(self.block1(x))
        return self.fc(x.mean((2, 3)))


class PlainCNN(nn.Module):
    """Four convolutions of different widths with bias, BatchNorm and ReLU, then a linear head: L = 5, a suffix is a slice."""

    LAYERS = ("features.0", "features.3", "features.6", "features.9", "fc")

    def __init__(self, widths: Sequence[int] = (4, 5, 6, 7), classes: int = 4) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for c_in, c_out in zip((3, *widths), widths, strict=False):
            modules += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*modules)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class ThreeConvs(nn.Module):
    """``a``, ``middle``, ``b``, linear head; ``middle`` (4 to 4 channels) is the odd one out of a test."""

    def __init__(self, middle: nn.Module, classes: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = middle
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(F.relu(self.a(x))))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


class Twice(nn.Module):
    """One convolution called twice in every forward."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Pair(nn.Module):
    """Two convolution modules over one weight ``Parameter``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class ScaledConv(nn.Conv2d):
    """A subclass that changes ``forward``: its output is not ``conv(x, W) + b``."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class NamedConv(nn.Conv2d):
    """A subclass that leaves ``forward`` alone."""


def conv4(cls: type[nn.Conv2d] = nn.Conv2d, **kwargs: object) -> nn.Conv2d:
    return cls(4, 4, 3, **{"padding": 1, **kwargs})  # type: ignore[arg-type]


def twice_used() -> ThreeConvs:
    return ThreeConvs(Twice(conv4()))


def tied() -> ThreeConvs:
    return ThreeConvs(Pair())


def parametrized() -> ThreeConvs:
    return ThreeConvs(parametrizations.weight_norm(conv4()))


def lazy() -> ThreeConvs:
    return ThreeConvs(nn.LazyConv2d(4, 3, padding=1))


def overridden() -> ThreeConvs:
    return ThreeConvs(conv4(ScaledConv))


def patched() -> ThreeConvs:
    conv = conv4()
    original = conv.forward
    conv.forward = lambda x: original(x) * 3.0  # type: ignore[method-assign]
    return ThreeConvs(conv)


def frozen_by_user() -> ThreeConvs:
    model = ThreeConvs(conv4())
    model.middle.weight.requires_grad_(False)
    return model


def circular() -> ThreeConvs:
    return ThreeConvs(conv4(padding="same", padding_mode="circular"))


class NeverCalled(ThreeConvs):
    def __init__(self) -> None:
        super().__init__(conv4())
        self.spare = conv4()


class Separable(nn.Module):
    """Grouped, depthwise and pointwise convolutions."""

    LAYERS = ("stem", "grouped", "depthwise", "pointwise", "fc")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        x = F.relu(self.pointwise(self.depthwise(x)))
        return self.fc(x.mean((2, 3)))


class ViTLike(nn.Module):
    """Patch embedding, then parameters that the forward uses directly (position embedding, layer scale), then two blocks."""

    LAYERS = ("patch", "up1", "down1", "up2", "down2", "head")

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.up1, self.down1 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.up2, self.down2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.scale1 * self.down1(F.gelu(self.up1(self.norm1(x))))
        x = x + self.scale2 * self.down2(F.gelu(self.up2(self.norm2(x))))
        return self.head(x.mean(1))


class Attention(nn.Module):
    """``nn.MultiheadAttention`` reads ``out_proj.weight`` without ever calling ``out_proj``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix = nn.Linear(width, width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(F.relu(self.mix(x)).mean(1))


def batches(count: int = 3, size: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Batch]:
    """``count`` mini-batches of 8x8 RGB noise with labels in 0..3."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def run_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Batch]) -> float:
    """The user's loop for one epoch, exactly as the documentation shows it; returns the mean loss."""
    model.train()
    total, count = 0.0, 0
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total, count = total + loss.item(), count + 1
    return total / count


def at(boundary: int) -> StaticModeSelection:
    """A schedule that lets the first epoch be SGD throughout and keeps the boundary at one place from then on."""
    return StaticModeSelection(kind=lambda epoch: boundary if epoch else 0, l_max=1.0)


def with_boundary(
    model: nn.Module, optimizer: torch.optim.Optimizer, boundary: int, data: Sequence[Batch] | None = None, **kwargs: object
) -> LocalizedLearning:
    """Attach localized learning and train until the first ``boundary`` layers are local (one epoch of SGD)."""
    local = LocalizedLearning(model, optimizer, epochs=20, preset="paper", schedule=at(boundary), **kwargs)  # type: ignore[arg-type]
    local.step(run_epoch(model, optimizer, data or batches(1, seed=99)))
    assert local.boundary == boundary, f"the schedule asked for {boundary}, the boundary is {local.boundary}"
    return local


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names in ``state_dict`` whose bits differ from ``before``."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
