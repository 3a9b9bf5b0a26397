"""Interrupted and uninterrupted runs for ``test_learning_state.py``; as a script, the second half of every interrupted one.

``python tests/resume.py DIR`` continues each checkpoint ``DIR/<scenario>-<step>.pt`` in this (new) process and writes what
comes out beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import PlainCNN, TwoBlockResNet, batches, twice_used
from torch import nn

from localsgd_ext import LocalizedLearning, StaticModeSelection

EPOCHS, BATCHES = 6, 3
STEPS = EPOCHS * BATCHES


def quick_moves(**kwargs: Any) -> dict[str, Any]:
    """Algorithm 1 with an alpha so large that only ``e_k >= K`` holds moves back: one every other epoch here."""
    return {"t_shift": 1, "alpha": 100.0, "lr": 0.01, **kwargs}


@dataclass(frozen=True)
class Scenario:
    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    options: Callable[[], dict[str, Any]]
    cuts: tuple[int, ...] = tuple(range(BATCHES, STEPS, BATCHES))  # in steps; ends of epochs unless given
    optimizer_first: bool = field(default=True)


def momentum_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


SCENARIOS = {
    "sgd": Scenario(TwoBlockResNet, momentum_sgd, quick_moves),
    "local first": Scenario(TwoBlockResNet, momentum_sgd, quick_moves, optimizer_first=False),
    "adamw": Scenario(PlainCNN, adamw, quick_moves),
    "toggle": Scenario(PlainCNN, momentum_sgd, lambda: quick_moves(supervision="toggle", bn_stats="freeze")),
    "momentum": Scenario(PlainCNN, momentum_sgd, lambda: quick_moves(momentum=0.9, lr_decay=4, lr_decay_every=2)),
    "sampled": Scenario(PlainCNN, momentum_sgd, lambda: quick_moves(sample=0.4), cuts=tuple(range(1, STEPS, 2))),
    "quadratic": Scenario(PlainCNN, adamw, lambda: {"schedule": "quadratic", "lr": 0.01}),
    "callable": Scenario(
        PlainCNN, adamw, lambda: {"schedule": StaticModeSelection(kind=lambda epoch: (0, 2, 3, 1, 3, 2, 0)[epoch]), "lr": 0.01}
    ),
    "frozen": Scenario(PlainCNN, adamw, lambda: quick_moves(rule="frozen", supervision="absolute")),
    "deferred": Scenario(
        twice_used,
        momentum_sgd,
        lambda: {"schedule": StaticModeSelection(kind=lambda epoch: (0, 2, 1, 2, 3, 2, 2)[epoch], l_max=1.0), "lr": 0.01},
        cuts=tuple(range(1, STEPS)),
    ),
    "refresh": Scenario(PlainCNN, momentum_sgd, lambda: quick_moves(refresh=4, momentum=0.5), cuts=tuple(range(1, STEPS))),
    "refresh by epoch": Scenario(
        PlainCNN,
        adamw,
        lambda: quick_moves(rule="frozen", supervision="absolute", refresh=lambda epoch: 1 + epoch),
        cuts=tuple(range(1, STEPS, 2)),
    ),
    # t_shift 3 gives K = 3 and one move, after epoch 3: the norm of the last epoch stays in the history, where it is compared.
    "mid-epoch": Scenario(
        TwoBlockResNet, momentum_sgd, lambda: quick_moves(momentum=0.5, t_shift=3), cuts=tuple(range(1, STEPS))
    ),
}


@dataclass
class Run:
    """One run of a scenario, trained step by step. The losses are replaced by a zigzag so that the sign flips."""

    scenario: Scenario

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.scenario.build().train()
        self.optimizer = self.scenario.optimizer(self.model.parameters())
        self.local = LocalizedLearning(self.model, self.optimizer, epochs=EPOCHS, preset="paper", **self.scenario.options())
        self.data = batches(BATCHES, seed=3)
        self.boundaries: list[int] = []

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            epoch, batch = divmod(step, BATCHES)
            x, y = self.data[batch]
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if batch == BATCHES - 1:
                self.local.step((1.0, 0.9, 1.2, 1.1, 1.3, 1.4)[epoch])
                self.boundaries.append(self.local.boundary)

    def state(self) -> dict[str, Any]:
        local = self.local.state_dict()
        return {"local": local, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        if self.scenario.optimizer_first:
            self.optimizer.load_state_dict(state["optimizer"])
        self.local.load_state_dict(state["local"])
        if not self.scenario.optimizer_first:
            self.optimizer.load_state_dict(state["optimizer"])

    def result(self) -> dict[str, Any]:
        return self.state() | {
            "boundary": self.local.boundary,
            "sign": self.local.sign,
            "layers": list(self.local.layers),
            "frozen": [name for name, p in self.model.named_parameters() if not p.requires_grad],
        }


def checkpoint(directory: Path, name: str, cut: int) -> Path:
    return directory / f"{name.replace(' ', '-')}-{cut}.pt"


def main(directory: Path) -> None:
    for name, scenario in SCENARIOS.items():
        for cut in scenario.cuts:
            run = Run(scenario)
            run.load(checkpoint(directory, name, cut))
            run.train(cut, STEPS)
            torch.save(run.result(), checkpoint(directory, name, cut).with_suffix(".done"))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
