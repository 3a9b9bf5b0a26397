"""What the local rule does to one linear layer, by formula and measured, and what the paper's recipes make of it by arithmetic.

``z = W x`` makes ``D = W C`` with ``C = Σ x xᵀ``. Every step multiplies ``W`` from the right by a polynomial in ``C``, so that after
steps of length ``lr`` it is ``W(0) exp(tau C)``, ``tau = Σ lr / ||D||``, up to the finite step: power iteration. What the length of
the steps is made of changes how fast ``tau`` grows and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.study_measures import rank_of, top_direction
from benchmarks.study_rules import DIRECTIONS, Seen, stepped
from benchmarks.tables import aligned, number
from localsgd_ext import DynamicModeSelection, hebbian_update_
from localsgd_ext.train.presets import PAPER, Hyperparameters

Table = list[tuple[str, ...]]
FILTERS, INPUTS, COUNT = 32, 64, 512
PATHS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # n * lr / ||W(0)||


def layer(offset: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``W [K, M]`` as PyTorch initialises it, and inputs ``x [count, M]`` with variances ``1/j`` and a mean, in fp64."""
    random = torch.Generator().manual_seed(seed)
    bound = INPUTS**-0.5
    weight = (2 * torch.rand(FILTERS, INPUTS, generator=random, dtype=torch.float64) - 1) * bound
    x = torch.randn(COUNT, INPUTS, generator=random, dtype=torch.float64) / torch.arange(1, INPUTS + 1).sqrt()
    turned = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=random, dtype=torch.float64)).Q
    return weight, x @ turned + offset  # the mean, as that of pictures and of ReLUs, is no eigenvector


def flow(weight: Tensor, moment: Tensor, tau: float) -> Tensor:
    """``W exp(tau C)``, up to a factor."""
    values, vectors = torch.linalg.eigh(moment)
    grown = torch.exp(tau * (values - values[-1 if tau > 0 else 0]))  # the largest is 1
    after: Tensor = (weight @ vectors * grown) @ vectors.T
    return after


def cosine_with_top(weight: Tensor, moment: Tensor) -> float:
    """Of the dominant right singular vector."""
    return float((torch.linalg.svd(weight, full_matrices=False).Vh[0] @ top_direction(moment)).abs())


@dataclass
class Walk:
    """The operation itself, step by step, on the same inputs."""

    weight: Tensor
    x: Tensor
    tau: float = 0.0
    overshoot: float = 0.0
    """``lr * lambda_1 / ||D||`` of the last step: the share of the top component that it adds or, with sign -1, takes off."""

    def go(self, steps: int, lr: float) -> None:
        for _ in range(steps):
            z = self.x @ self.weight.T
            length = float((z.T @ self.x).norm())
            self.tau += lr / length
            self.overshoot = abs(lr) / length * float(self._largest)
            hebbian_update_(self.weight, self.x, z, lr)

    def __post_init__(self) -> None:
        self.weight = self.weight.clone()
        self._largest = torch.linalg.eigvalsh(self.x.T @ self.x)[-1]


def collapse(lr: float = 0.01) -> Table:
    """Effective rank by the length of the way, measured and by the formula."""
    start, x = layer()
    moment = x.T @ x
    table: Table = [("way / norm at the start", "steps", "rank, measured", "rank, formula", "cos with top", "norm")]
    walk, done = Walk(start, x), 0
    for path in PATHS:
        steps = round(path * float(start.norm()) / lr)
        walk.go(steps - done, lr)
        done = steps
        shown = (rank_of(walk.weight), rank_of(flow(start, moment, walk.tau)))
        cosine, norm = cosine_with_top(walk.weight, moment), float(walk.weight.norm())
        table.append((f"{path:g}", str(steps), f"{shown[0]:.1f}", f"{shown[1]:.1f}", f"{cosine:.3f}", number(norm)))
    return table


def minus(lr: float = 0.01) -> Table:
    """Sign -1 from filters as initialised, and from filters that sign +1 has gathered at the top direction."""
    start, x = layer()
    moment = x.T @ x
    table: Table = [("sign -1: from", "way / norm at the start", "rank", "cos with top", "norm", "lr * lambda_1 / norm of D")]
    gathered = Walk(start, x)
    gathered.go(round(float(start.norm()) / lr), lr)
    for name, begin in (("initialised", start), ("gathered by way 1 with sign +1", gathered.weight)):
        walk, done = Walk(begin, x), 0
        for path in (0.0, 0.1, 0.3, 1.0, 3.0):
            steps = round(path * float(start.norm()) / lr)
            walk.go(steps - done, -lr)
            done = steps
            cosine, norm = cosine_with_top(walk.weight, moment), float(walk.weight.norm())
            shown = "-" if steps == 0 else f"{walk.overshoot:.2f}"
            table.append((name, f"{path:g}", f"{rank_of(walk.weight):.1f}", f"{cosine:.3f}", number(norm), shown))
    return table


def there_and_back(lr: float = 0.01) -> Table:
    """As many steps with +1 as with -1 after them: all steps are polynomials in ``C``, so they commute and nearly cancel."""
    start, x = layer()
    table: Table = [("+1 and back with -1, way / norm each", "rank there", "rank back", "distance from the start / norm")]
    for path in (0.1, 0.3, 1.0, 3.0):
        steps = round(path * float(start.norm()) / lr)
        walk = Walk(start, x)
        walk.go(steps, lr)
        there = rank_of(walk.weight)
        walk.go(steps, -lr)
        apart = float((walk.weight - start).norm() / start.norm())
        table.append((f"{path:g}", f"{there:.1f}", f"{rank_of(walk.weight):.1f}", f"{apart:.2f}"))
    return table


RULES: dict[str, tuple[str, str]] = {
    "literal": ("hebb", "absolute"),
    "relative step": ("hebb", "relative"),
    "norm kept": ("hebb", "preserving"),
    "per filter": ("per filter", "absolute"),
    "centred": ("centred", "absolute"),
    "BN output as z": ("bn", "absolute"),
    "Oja": ("oja", "absolute"),
    "Oja's subspace": ("subspace", "absolute"),
}


def rules(lr: float = 0.01) -> Table:
    """The study's rules on the same layer, after as many steps as the literal one needs to go its norm's way, and thrice that."""
    start, x = layer()
    steps = round(float(start.norm()) / lr)
    table: Table = [(f"rule, lr {lr:g}", f"rank after {steps} steps", f"after {3 * steps}", "cos with top", "norm")]
    for name, (rule, step) in RULES.items():
        once = rule_after(start, x, rule, step, lr, steps)
        thrice = rule_after(once, x, rule, step, lr, 2 * steps)
        cosine, norm = cosine_with_top(thrice, x.T @ x), float(thrice.norm())
        shown = f"{norm:.0e}" if norm > 1e4 else number(norm)
        table.append((name, f"{rank_of(once):.1f}", f"{rank_of(thrice):.1f}", f"{cosine:.3f}", shown))
    return table


@torch.no_grad()
def rule_after(start: Tensor, x: Tensor, rule: str, step: str, lr: float, steps: int) -> Tensor:
    """The weight after ``steps`` steps of one of the study's rules, which see the linear layer as a 1x1 convolution."""
    module = nn.Conv2d(x.shape[1], len(start), 1, bias=False, dtype=start.dtype)
    norm = nn.BatchNorm2d(len(start), dtype=start.dtype)
    module.weight.copy_(start[:, :, None, None])
    pictures = x[:, :, None, None]
    for _ in range(steps):
        seen = Seen(module, norm, pictures, module(pictures))
        module.weight.copy_(stepped(seen.weight, DIRECTIONS[rule](seen), lr, step)[:, :, None, None])
    return module.weight.detach().flatten(1)


@dataclass(frozen=True)
class Network:
    layers: int
    block: int  # t_shift
    images: int


NETWORKS = {
    ("cifar10", "resnet18"): Network(21, 2, 50_000),
    ("cifar10", "vgg13"): Network(11, 1, 50_000),
    ("cifar100", "resnet18"): Network(21, 2, 50_000),
    ("imagenet", "resnet34"): Network(37, 2, 1_281_167),
    ("imagenet", "resnet50"): Network(54, 3, 1_281_167),
    ("imagenet", "mobilenet_v2"): Network(53, 3, 1_281_167),
}
NORM = (2 * 64) ** 0.5  # of a 3x3 layer from 64 channels to 64 as He initialises it for its outputs: sqrt(2 C)


def sgd_lr(recipe: Hyperparameters, epoch: int) -> float:
    """Learning rate of SGD in an epoch of one of the paper's recipes."""
    if recipe.lr_schedule == "cosine":
        return recipe.lr * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
    return recipe.lr * recipe.lr_gamma ** (epoch // recipe.lr_step)


def boundaries(network: Network, epochs: int) -> list[int]:
    """Of every epoch, where Algorithm 1 moves whenever equation 2 lets it."""
    schedule = DynamicModeSelection(network.layers, epochs, t_shift=network.block)
    return [0, *(schedule.step(0.5**epoch) for epoch in range(epochs - 1))]


def recipes() -> Table:
    """How much of SGD's learning, as the sum of its learning rates, is over when layers turn local, and how far those then go."""
    heading = (
        "paper's recipe",
        "first layers local from epoch",
        "SGD's lr over by then",
        "a quarter local from",
        "SGD's lr over",
    )
    table: Table = [(*heading, "local way of the first layers / norm", "a local epoch at first / norm")]
    for key, network in NETWORKS.items():
        recipe = PAPER[key]
        where = boundaries(network, recipe.epochs)
        spent = [sgd_lr(recipe, epoch) for epoch in range(recipe.epochs)]
        first = next(epoch for epoch, boundary in enumerate(where) if boundary > 0)
        quarter = next(epoch for epoch, boundary in enumerate(where) if boundary >= network.layers / 4)
        steps = network.images // recipe.batch_size
        ways = [
            steps * recipe.local_lr / recipe.local_lr_decay ** (e // recipe.local_lr_decay_every) for e in range(recipe.epochs)
        ]
        table.append(
            (
                f"{key[1]} on {key[0]}",
                f"{first} of {recipe.epochs}",
                _percent(spent[:first], spent),
                str(quarter),
                _percent(spent[:quarter], spent),
                number(sum(ways[first:]) / NORM),
                number(ways[first] / NORM),
            )
        )
    return table


def _percent(part: Sequence[float], whole: Sequence[float]) -> str:
    return f"{100 * sum(part) / sum(whole):.1f} %"


def report() -> str:
    parts = [
        f"One linear layer, {INPUTS} inputs, {FILTERS} filters, {COUNT} inputs' vectors, the same in every step.",
        "### Sign +1: filters gather at the top direction\n\n" + aligned(collapse()),
        "### The same with lr 0.001: ten times the steps, the same ranks\n\n" + aligned(collapse(0.001)),
        "### Sign -1\n\n" + aligned(minus()),
        "### There and back\n\n" + aligned(there_and_back()),
        "### Rules\n\n" + aligned(rules()),
        f"### The paper's recipes (norm: {NORM:.1f}, a 3x3 layer of 64 channels as initialised)\n\n" + aligned(recipes()),
    ]
    return "\n\n".join(parts) + "\n"
