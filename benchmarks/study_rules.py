"""The local rules that benchmarks/study.py compares: a direction for a layer's weight, and how far to step along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsgd_ext import correlation
from localsgd_ext.sampling import sampled

STEPS = ("absolute", "relative", "preserving")
SIGNS = ("supervised", "plus", "minus", "alternating")
DECAY_EVERY = 5  # epochs: a third of the study's 14, as the paper's 30 are of its 90


@dataclass(frozen=True)
class Seen:
    """What a convolution without bias or groups sees of one mini-batch. Matrices are ``[K, M]``, ``M = C*R*S``."""

    module: nn.Conv2d
    norm: nn.BatchNorm2d | None
    x: Tensor  # [N, C, H, W]
    z: Tensor  # [N, K, P, Q]

    @property
    def weight(self) -> Tensor:
        return self.module.weight.detach().flatten(1)

    @property
    def outputs(self) -> Tensor:
        """``[K, N*P*Q]``"""
        return self.z.transpose(0, 1).flatten(1)

    def correlated(self, z: Tensor) -> Tensor:
        """``D`` of the input patches with ``z [N, K', P, Q]``, as ``[K', M]``."""
        m = self.module
        like = m.weight.detach()[:1].expand(z.shape[1], -1, -1, -1)  # only its shape and dtype are read
        return correlation(self.x, z, like, stride=m.stride, padding=m.padding, dilation=m.dilation).flatten(1)


def hebb(seen: Seen) -> Tensor:
    """``D``: paper, equation 3."""
    return seen.correlated(seen.z)


def per_filter(seen: Seen) -> Tensor:
    """Every filter's row of ``D`` at the same length."""
    return F.normalize(hebb(seen), dim=1)


def oja(seen: Seen) -> Tensor:
    """``D - diag(Σ z²) W``: each filter by itself goes to the top direction and stays at length 1."""
    return hebb(seen) - seen.outputs.square().sum(1, keepdim=True) * seen.weight


def subspace(seen: Seen) -> Tensor:
    """``D - (Σ z zᵀ) W``: the filters together span the top directions and stay orthogonal."""
    return hebb(seen) - seen.outputs @ seen.outputs.T @ seen.weight


def centred(seen: Seen) -> Tensor:
    """``D`` of patches less their mean: ``D - Σz ⊗ Σx / count``, a rank-1 correction."""
    count = seen.outputs.shape[1]
    patches = seen.correlated(torch.ones_like(seen.z[:, :1]))  # [1, M], the sum of all patches
    return hebb(seen) - seen.outputs.sum(1, keepdim=True) @ patches / count


def batch_norm(seen: Seen) -> Tensor:
    """``D`` with the output of the BatchNorm behind the layer in the place of ``z``."""
    assert seen.norm is not None
    scale, shift = seen.norm.weight.detach(), seen.norm.bias.detach()
    return seen.correlated(F.batch_norm(seen.z, None, None, scale, shift, training=True, eps=seen.norm.eps))


def random(seen: Seen) -> Tensor:
    """A direction drawn once for every shape: a straight way that has nothing to do with the data, as a control."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(seen.weight.shape, generator=generator).to(seen.weight)


DIRECTIONS: dict[str, Callable[[Seen], Tensor]] = {
    "hebb": hebb, "per filter": per_filter, "oja": oja, "subspace": subspace, "centred": centred, "bn": batch_norm,
    "random": random,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How the layers of the prefix learn: ``rule`` is ``"sgd"`` (there is no prefix), ``"frozen"``, or a direction."""

    rule: str = "hebb"
    lr: float = 0.01
    step: str = "absolute"
    sign: str = "supervised"
    decay: float = 1.0
    """Divides ``lr`` every ``DECAY_EVERY`` epochs, counted from the start of training."""
    sample: float = 1.0
    recipe: str = "cosine"
    """``"cosine"``, or ``"stopped"``: SGD's learning rate all but 0 once the boundary moves."""

    def lr_at(self, epoch: int) -> float:
        return self.lr / self.decay ** (epoch // DECAY_EVERY)

    def sign_at(self, supervised: int, epoch: int) -> int:
        """``supervised``: what Algorithm 2 says."""
        return {"supervised": supervised, "plus": 1, "minus": -1, "alternating": 1 - 2 * (epoch % 2)}[self.sign]


def stepped(weight: Tensor, direction: Tensor, lr: float, step: str) -> Tensor:
    """The weight ``[K, M]`` after a step of length ``|lr|``, ``|lr| * ||W||``, or ``|lr|`` followed by scaling to the old norm."""
    length = lr * weight.norm() if step == "relative" else lr
    after = weight.add(length * direction / direction.norm())
    if step == "preserving":
        after *= weight.norm() / after.norm()
    return after


class LocalLayers:
    """Forward hooks that make a variant's steps on the layers that are active."""

    def __init__(self, model: nn.Module, layers: Iterable[str], norms: Mapping[str, str], variant: Variant) -> None:
        self.variant = variant
        self.active: frozenset[str] = frozenset()
        self.lr = 0.0
        """Signed."""
        self.turn = 0
        """Index of the mini-batch, for ``sample``."""
        modules: dict[str, Any] = dict(model.named_modules())
        self._handles = [
            modules[name].register_forward_hook(partial(self._after, name, modules.get(norms.get(name, "")))) for name in layers
        ]
        self._handles.append(model.register_forward_hook(self._next))

    def _next(self, module: nn.Module, *_: Any) -> None:
        self.turn += module.training

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _after(self, name: str, norm: nn.BatchNorm2d | None, module: nn.Conv2d, args: tuple[Tensor], z: Tensor) -> None:
        if not module.training or name not in self.active:
            return
        x, z = sampled(module.weight, args[0].detach(), z.detach(), self.variant.sample, self.turn)
        seen = Seen(module, norm, x, z)
        after = stepped(seen.weight, DIRECTIONS[self.variant.rule](seen), self.lr, self.variant.step)
        module.weight.copy_(after.view(module.weight.shape))
