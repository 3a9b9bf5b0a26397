"""Every number of the paper's section 6.1, written out from its text."""

from __future__ import annotations

import dataclasses

import pytest

from localsgd_ext.train import presets
from localsgd_ext.train.config import resolve

# data, model: epochs, batch, lr, schedule, step, gamma, weight decay, local lr divided by ... every 30 epochs
SECTION_6_1 = {
    ("imagenet", "resnet50"): (90, 64, 0.025, "step", 30, 0.1, 4e-5, 10),
    ("imagenet", "resnet34"): (90, 64, 0.025, "step", 30, 0.1, 4e-5, 10),
    ("imagenet", "mobilenet_v2"): (150, 64, 0.0125, "cosine", None, None, 4e-5, 10),
    ("cifar10", "resnet18"): (90, 64, 0.05, "step", 10, 0.1, 5e-4, 2),
    ("cifar10", "vgg13"): (90, 64, 0.05, "step", 10, 0.1, 5e-4, 2),
    ("cifar100", "resnet18"): (150, 64, 0.025, "step", 20, 0.5, 5e-4, 2),
    ("cifar100", "vgg13"): (150, 64, 0.025, "step", 20, 0.5, 5e-4, 2),
}


def test_the_table_has_the_papers_benchmarks() -> None:
    assert presets.PAPER.keys() == SECTION_6_1.keys()


@pytest.mark.parametrize(("data", "model"), SECTION_6_1)
def test_values(data: str, model: str) -> None:
    epochs, batch, lr, schedule, step, gamma, weight_decay, local_divisor = SECTION_6_1[data, model]
    got = resolve(data, model, "local", "paper")
    assert (got.epochs, got.batch_size, got.lr, got.lr_schedule, got.weight_decay) == (
        epochs,
        batch,
        lr,
        schedule,
        weight_decay,
    )
    if schedule == "step":
        assert (got.lr_step, got.lr_gamma) == (step, gamma)
    assert (got.local_lr, got.local_lr_decay, got.local_lr_decay_every) == (0.01, local_divisor, 30)
    assert (got.alpha, got.l_max, got.t_shift, got.schedule, got.supervision) == (0.95, 0.75, "auto", "dynamic", "absolute")
    assert got.momentum == 0.9  # not in the paper


def test_options_override_the_preset() -> None:
    got = resolve("cifar10", "vgg13", "local", "paper", epochs=3, local_lr=0.5)
    assert (got.epochs, got.local_lr, got.lr) == (3, 0.5, 0.05)


@pytest.mark.parametrize(("data", "model"), [("glyphs", "small_resnet"), ("cifar10", "resnet50"), ("imagenet", "vgg13")])
def test_benchmarks_the_paper_does_not_have(data: str, model: str) -> None:
    with pytest.raises(ValueError, match=f"--preset paper has no values for {model} on {data}; .*resnet18 on cifar10"):
        resolve(data, model, "local", "paper")


def test_local_paper_takes_the_papers_rate_without_its_preset() -> None:
    assert resolve("glyphs", "small_resnet", "local").local_lr == 1e-4
    got = resolve("glyphs", "small_resnet", "local-paper")
    assert (got.local_lr, got.local_lr_decay, got.local_lr_decay_every) == (0.01, 2, 30)
    assert resolve("imagenet", "resnet50", "local-paper").local_lr_decay == 10


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        presets.DEFAULTS.lr = 1.0  # type: ignore[misc]
