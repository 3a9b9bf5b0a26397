"""``localsgd train --replay``: epochs that begin where the prefix ends, what they cost, and their way through a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from same_runs import assert_same_run
from torch import nn

from localsgd_ext.__main__ import main
from localsgd_ext.train import models
from localsgd_ext.train.compare import Comparison, left_out, options_for
from localsgd_ext.train.config import METHODS, RunConfig, resolve
from localsgd_ext.train.loop import Trainer

# The tiny run's boundaries are 0, 0, 2, 2, 4, 4: two epochs are replayed.
REPLAYED: dict[str, Any] = {"epochs": 6, "replay": 2**24}


def _run(trainer: Trainer) -> list[dict[str, Any]]:
    while not trainer.done:
        trainer.run_epoch()
    trainer.finish()
    return trainer.metrics


def _column(metrics: list[dict[str, Any]], name: str) -> list[Any]:
    return [entry[name] for entry in metrics]


def test_what_replayed_epochs_cost(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    plain = _run(trainer(tiny("freeze", epochs=6), "plain"))
    made = trainer(tiny("freeze", **REPLAYED), "replayed")
    replayed = _run(made)
    assert _column(replayed, "boundary") == _column(plain, "boundary") == [0, 0, 2, 2, 4, 4]
    assert _column(plain, "replayed") == [False] * 6
    assert _column(replayed, "replayed") == [False, False, False, True, False, True]
    assert _column(replayed, "train_loss")[:3] == _column(plain, "train_loss")[:3]
    # The forward of what comes before the cut: the stem, and then a block of two layers more; pictures of 8 by 8.
    stem, layer = 9 * 3 * 16 * 64, 9 * 16 * 16 * 64
    images = 96
    saved = [before - after for before, after in zip(*(_column(m, "multiply_adds") for m in (plain, replayed)), strict=True)]
    assert saved == [0, 0, 0, images * stem, 0, images * (stem + 2 * layer)]


class Dropping(nn.Sequential):
    """Random numbers are drawn before and behind the cut."""

    def __init__(self, num_classes: int) -> None:
        body = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)]
        body += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.3)]
        super().__init__(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.mark.parametrize("options", [{}, {"bn_stats": "freeze"}, {"bn_stats": "fold"}, {"amp": "bf16"}], ids=str)
def test_resuming_after_every_epoch(
    options: dict[str, Any],
    tmp_path: Path,
    tiny: Callable[..., RunConfig],
    trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, in the middle of epochs that are replayed too: what was kept is made again."""
    monkeypatch.setitem(models.MODELS, "small_vgg", Dropping)
    config = tiny("freeze", **REPLAYED, schedule="linear", l_max=0.5, lr=0.1, **options).replace(model="small_vgg", epochs=8)
    metrics = _run(trainer(config, "straight"))
    assert sum(_column(metrics, "replayed")) >= 3
    for _ in range(8):
        going_on = trainer(config, "stopped", resume=(tmp_path / "stopped").exists())
        going_on.run_epoch()
    going_on.finish()
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_command_line(tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["train", *tiny_flags, "--method", "freeze", "--epochs", "4", "--out", str(out)]
    assert main([*command, "--replay", "1 MiB"]) == 0
    assert "prefix 2/14, replayed" in (out / "log.txt").read_text()
    for value, said in (("2G", "--replay must be a number of bytes, with a unit"), ("0", "--replay must be at least one byte")):
        assert main([*command, "--replay", value]) == 2
        assert said in capsys.readouterr().err


def test_a_budget_that_is_too_small_is_in_the_log(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    metrics = _run(trainer(tiny("freeze", epochs=4, replay=1000), "run"))
    assert not any(_column(metrics, "replayed"))
    assert "no epoch at boundary 2 is replayed: what the prefix puts out" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replay": 0}, "--replay must be a whole number of bytes, at least 1, got 0"),
        ({"replay": 1.5}, r"--replay must be a whole number of bytes, at least 1, got 1\.5"),
        (
            {"method": "local", "replay": 1},
            "--replay needs a prefix that does not learn: --method freeze without .*got --method local",
        ),
        ({"method": "sgd", "replay": 1}, "got --method sgd"),
        ({"refresh": 4, "replay": 1}, "got --method freeze, --refresh 4"),
        ({"memory_budget": 1, "replay": 1}, "--replay cannot go with --memory-budget"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    values = {"method": "freeze", **changes}
    with pytest.raises(ValueError, match=said):
        resolve("fake", "small_resnet", **values)


def test_a_comparison_leaves_it_to_the_method_that_has_it() -> None:
    flags = {"replay": 2**20, "bn_stats": "freeze"}
    configs = {m: resolve("digits", "small_resnet", m, **options_for(m, METHODS, flags)) for m in ("sgd", "freeze", "refresh")}
    assert {m: (c.replay, c.bn_stats) for m, c in configs.items()} == {
        "sgd": (None, "update"), "freeze": (2**20, "freeze"), "refresh": (None, "freeze")
    }  # fmt: skip
    said = left_out(Comparison(configs, (0,)))
    assert (
        said
        == "--bn-stats: not for sgd, without a boundary; --replay: not for sgd, refresh, which have no prefix that stands still"
    )
