"""The parts of a run as its configuration asks for them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, StepLR

from localsgd_ext import LocalizedLearning, StaticModeSelection
from localsgd_ext.train.config import HEBBIAN, NOT_PREFIX, RunConfig


def localized_learning(
    config: RunConfig, model: nn.Module, optimizer: Optimizer, on_boundary_move: Callable[[int, int], None]
) -> LocalizedLearning | None:
    """``None`` for methods without a boundary. ``model`` may be a ``ReplicatedModel``."""
    if config.method in NOT_PREFIX:
        return None
    as_printed = config.method == "local-paper" or config.preset == "paper"
    schedule: dict[str, Any] = {
        "schedule": config.schedule,
        "l_max": config.l_max,
        "min_loss_drop": 0.0 if config.min_loss_drop is None and as_printed else config.min_loss_drop,
    }
    if config.schedule == "local-first":
        schedule = {"schedule": local_first(config)}
    elif config.schedule == "dynamic":
        schedule |= {"alpha": config.alpha, "t_shift": config.t_shift}
    supervised = config.method in HEBBIAN and config.supervision != "none"
    return LocalizedLearning(
        model,
        optimizer,
        epochs=config.epochs,
        rule="hebbian" if config.method in HEBBIAN else "frozen",
        **schedule,
        lr=config.local_lr,
        lr_decay=config.local_lr_decay,
        lr_decay_every=config.local_lr_decay_every,
        sample=config.sample,
        refresh=config.refresh or None,
        supervision=config.supervision if supervised else None,
        bn_stats=config.bn_stats,
        nan_policy=config.nan_policy,
        on_boundary_move=on_boundary_move,
    )


def local_first(config: RunConfig) -> StaticModeSelection:
    """The linear schedule backwards: every boundary of it as often, the largest first (paper, section 2.2)."""

    def boundary(epoch: int) -> int:
        forwards = StaticModeSelection(schedule.num_layers, config.epochs, kind="linear", l_max=config.l_max)
        return forwards.at(max(0, config.epochs - 1 - epoch))

    schedule = StaticModeSelection(kind=boundary, l_max=config.l_max)
    return schedule


def lr_scheduler(optimizer: Optimizer, config: RunConfig) -> LRScheduler:
    if config.lr_schedule == "step":
        return StepLR(optimizer, step_size=config.lr_step, gamma=config.lr_gamma)
    if config.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs)
    return ConstantLR(optimizer, factor=1.0)


def set_determinism(config: RunConfig, device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)


def seed_everything(seed: int) -> None:
    """For whatever draws from the global generators during an epoch: dropout, stochastic depth."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the legacy generator is the global one
    torch.manual_seed(seed)
