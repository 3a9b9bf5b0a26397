"""Networks whose BatchNorm can be folded, or not, and runs of them with ``bn_stats="fold"`` and ``"freeze"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import Batch, batches, seeded
from torch import Tensor, nn

from localsgd_ext import LocalizedLearning, StaticModeSelection

DATA = batches(4, dtype=torch.float64)
PATH = (0, 2, 4, 4, 3, 0, 2)


class Inverted(nn.Module):
    """MobileNetV2's block: the last convolution is linear, its BatchNorm goes into the sum."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
            nn.Conv2d(8, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Mobile(nn.Module):
    """Two blocks, then a BatchNorm1d behind a linear layer: eight pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4, affine=False))
        self.blocks = nn.Sequential(Inverted(), Inverted())
        self.mix, self.norm, self.fc = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).mean((2, 3))
        return self.fc(F.relu(self.norm(self.mix(x))))


class Run:
    """A model in training with ``bn_stats``; two epochs of SGD first, so that statistics are those of some data."""

    def __init__(self, build: Callable[[], nn.Module], bn_stats: str, path: tuple[int, ...] = PATH, **options: Any) -> None:
        self.model = seeded(build).to(torch.float64)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        self.forward: Callable[..., Any] = self.model
        for x, y in DATA * 2:
            self.step(x, y)
        schedule = StaticModeSelection(kind=lambda epoch: path[min(epoch, len(path) - 1)], l_max=1.0)
        self.local = LocalizedLearning(
            self.model, self.optimizer, epochs=len(path), schedule=schedule, rule="frozen", bn_stats=bn_stats, **options
        )
        self.local.trace(DATA[0][0])

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        output = self.forward(x)
        F.cross_entropy(output, y).backward()
        self.optimizer.step()
        return output.detach()

    def epoch(self, data: list[Batch] = DATA) -> list[Tensor]:
        outputs = [self.step(x, y) for x, y in data]
        self.local.step()
        return outputs


def folded(model: nn.Module) -> set[str]:
    """Names of the layers whose forward is a folded one."""
    kinds = nn.Conv2d | nn.Linear
    return {name for name, module in model.named_modules() if isinstance(module, kinds) and "forward" in vars(module)}


def norm_passes(model: nn.Module, x: Tensor) -> int:
    """How many BatchNorms a training forward computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::batch_norm")


def both(build: Callable[[], nn.Module], path: tuple[int, ...] = PATH, **options: Any) -> tuple[Run, Run]:
    return Run(build, "fold", path, **options), Run(build, "freeze", path, **options)


def assert_same(fold: Run, freeze: Run, where: object = "") -> None:
    """Weights, statistics and what a forward returns, in training and in evaluation mode."""
    state, expected = fold.model.state_dict(), freeze.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{where} {n}: {m}")


def load_larger(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


class Reads(nn.Module):
    """Convolution and BatchNorm, twice; ``how`` says who else reads the first convolution's output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Any:
        z = self.conv1(x)
        if self.how == "in place before":
            z.mul_(2.0)
        y = F.relu(self.bn1(z))
        if self.how == "twice":
            y = y + self.bn1(y)
        y = F.relu(self.bn2(self.conv2(y)))
        if self.how == "layer twice":
            y = y + self.conv2(y)
        if self.how == "skip":
            y = y + z
        if self.how == "out of sight":
            with torch._C.DisableTorchFunction():
                y = y + z
        if self.how == "without gradients":
            self.seen = z.detach().mean()
        if self.how == "by its value":
            y = y * (2.0 if z.tolist()[0][0][0][0] > 0 else 1.0)
        if self.how == "custom":
            y = y + Double.apply(z)
        if self.how == "kept":
            self.seen = [z]
        out = self.fc(y.mean((2, 3)))
        return (out, z) if self.how == "returned" else out


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2.0 * z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad
