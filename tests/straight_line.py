"""The whole method once more, straight from the paper, for one network (:class:`models.TwoBlockResNet`).

No hooks, no modules, no operations of the package: parameters in a dict, an explicit forward, the correlation from unfolded
patches, BatchNorm and SGD written out. ``test_learning_reimplementation.py`` holds the package against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

LAYERS = ("stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.down", "fc")
BN_AFTER = {
    "stem": "bn",
    "block1.conv1": "block1.bn1",
    "block1.conv2": "block1.bn2",
    "block2.conv1": "block2.bn1",
    "block2.conv2": "block2.bn2",
    "block2.down": "block2.down_bn",
}
GEOMETRY = {  # stride, padding
    "stem": (1, 1),
    "block1.conv1": (1, 1),
    "block1.conv2": (1, 1),
    "block2.conv1": (2, 1),
    "block2.conv2": (1, 1),
    "block2.down": (2, 0),
}


@dataclass
class StraightLine:
    """The state and the epoch loop of LoCal+SGD. ``state`` maps ``state_dict`` names to tensors and is trained in place."""

    state: dict[str, Tensor]
    epochs: int
    alpha: float = 0.95
    l_max: float = 0.75
    t_shift: int = 1
    local_lr: float = 1e-4
    lr_decay: float = 2.0
    lr_decay_every: int = 30
    rule: str = "hebbian"
    toggle: bool = False
    normalize: bool = True
    activation: Callable[[Tensor], Tensor] = lambda z: z
    local_momentum: float = 0.0
    bn_update: bool = True
    refresh: int = 0
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    boundary: int = 0
    sign: int = 1
    epoch: int = 0
    since_move: int = 0
    since_refresh: int = 0
    through: bool = False
    last_loss: float | None = None
    norms: list[float] = field(default_factory=list)
    sgd_buffers: dict[str, Tensor] = field(default_factory=dict)
    local_buffers: dict[str, Tensor] = field(default_factory=dict)

    def trained_by_sgd(self, name: str) -> bool:
        return self.through or not self.in_prefix(name)

    def in_prefix(self, name: str) -> bool:
        """BatchNorm belongs to the layer in front of it: its affine parameters are first used before the next layer runs."""
        owner = name.rsplit(".", 1)[0]
        layer = next((layer for layer, bn in BN_AFTER.items() if bn == owner), owner)
        return LAYERS.index(layer) < self.boundary

    def layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if name == "fc":
            return F.linear(x, weight, bias)
        stride, padding = GEOMETRY[name]
        z = F.conv2d(x, weight, bias, stride, padding)
        if LAYERS.index(name) < self.boundary and not self.through and self.rule == "hebbian":
            self.update(name, x, z, stride, padding)
        return z

    @torch.no_grad()
    def update(self, name: str, x: Tensor, z: Tensor, stride: int, padding: int) -> None:
        weight = self.state[f"{name}.weight"]
        patches = F.unfold(x, weight.shape[2:], stride=stride, padding=padding)  # [N, C*R*S, P*Q]
        d = torch.einsum("nkp,ncp->kc", self.activation(z).flatten(2), patches).view_as(weight)  # equation 3
        step = d / d.square().sum().sqrt() if self.normalize else d  # equation 4
        if self.local_momentum:
            old = self.local_buffers.get(name)
            step = step if old is None else self.local_momentum * old + step
            self.local_buffers[name] = step
        lr = self.local_lr / self.lr_decay ** (self.epoch // self.lr_decay_every)
        weight += self.sign * lr * step  # Algorithm 2

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        if self.in_prefix(f"{name}.weight") and not self.bn_update:
            mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        else:
            count = x.numel() / x.shape[1]
            with torch.no_grad():
                self.state[f"{name}.running_mean"].mul_(0.9).add_(0.1 * mean)
                self.state[f"{name}.running_var"].mul_(0.9).add_(0.1 * var * count / (count - 1))
                self.state[f"{name}.num_batches_tracked"] += 1
        normal = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return normal * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def conv_bn(self, name: str, x: Tensor) -> Tensor:
        return self.batch_norm(BN_AFTER[name], self.layer(name, x))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_bn("stem", x))
        y = F.relu(self.conv_bn("block1.conv1", x))
        x = F.relu(self.conv_bn("block1.conv2", y) + x)
        y = F.relu(self.conv_bn("block2.conv1", x))
        y = self.conv_bn("block2.conv2", y)
        x = F.relu(y + self.conv_bn("block2.down", x))
        return self.layer("fc", x.mean((2, 3)))

    def run_epoch(self, batches: Sequence[tuple[Tensor, Tensor]], sgd_lr: float) -> float:
        """One epoch and what happens at its end; returns the mean loss."""
        transition = self.state[f"{LAYERS[self.boundary]}.weight"]
        start, losses = transition.detach().clone(), []
        for x, y in batches:
            self.through = 0 < self.refresh <= self.since_refresh + 1 and self.boundary > 0
            parameters = {n: p for n, p in self.state.items() if n.endswith(("weight", "bias")) and self.trained_by_sgd(n)}
            for p in parameters.values():
                p.requires_grad_(True)
            loss = F.cross_entropy(self.forward(x), y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                    p.requires_grad_(False)
                    step = gradient + self.weight_decay * p
                    if self.sgd_momentum:
                        old = self.sgd_buffers.get(name)
                        step = step if old is None else self.sgd_momentum * old + step
                        self.sgd_buffers[name] = step
                    p -= sgd_lr * step
            losses.append(loss.item())
            if self.boundary > 0:
                self.since_refresh = 0 if self.through else self.since_refresh + 1
        mean_loss = sum(losses) / len(losses)
        self.end_epoch((transition - start).square().sum().sqrt().item(), mean_loss)
        return mean_loss

    def end_epoch(self, norm: float, loss: float) -> None:
        # Algorithm 1
        k = max(1, int(self.epochs * self.t_shift / (self.l_max * len(LAYERS))))
        cap = int(self.l_max * len(LAYERS))
        shift = len(self.norms) >= k and self.since_move >= k and norm <= self.alpha * sum(self.norms[-k:]) / k
        if shift and self.boundary < cap:
            self.boundary = min(self.boundary + self.t_shift, cap)
            self.since_move, self.norms = 0, []
        else:
            self.since_move += 1
            self.norms.append(norm)
        # Algorithm 2
        rose = self.last_loss is not None and self.last_loss < loss
        if self.toggle:
            self.sign = -self.sign if rose else self.sign
        else:
            self.sign = -1 if rose else 1
        self.last_loss = loss
        self.epoch += 1
