"""``localsgd train --nan-policy``, with a mini-batch spoilt on its way into the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from localsgd_ext.__main__ import main
from localsgd_ext.train import checkpoint
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.data import Batch
from localsgd_ext.train.loop import Trainer


def spoil(trainer: Trainer, epoch: int, step: int) -> None:
    """One NaN in one picture of the mini-batch ``step`` of ``epoch``, both from 0."""
    good = trainer.data.train

    def train(number: int, batch_size: int | None = None) -> Iterator[Batch]:
        for i, (x, y) in enumerate(good(number, batch_size)):
            if (number, i) == (epoch, step):
                x[0, 0, 0, 0] = float("nan")
            yield x, y

    trainer.data.train = train  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["local", "refresh"])
def test_skip_leaves_no_trace(method: str, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    """Beside the plain loop that never saw the mini-batch, up to the epoch's end, where they would count mini-batches otherwise."""
    spoilt, plain = (trainer(tiny(method, nan_policy="skip"), name) for name in ("spoilt", "plain"))
    spoil(spoilt, 0, 2)
    good = plain.data.train
    plain.data.train = lambda *args: (b for i, b in enumerate(good(*args)) if i != 2)  # type: ignore[method-assign]
    mine, theirs = spoilt.run_epoch(), plain.run_epoch()
    assert mine["skipped_steps"] == 1
    assert set(mine["kept_statistics"].values()) == {1}
    assert len(mine["kept_statistics"]) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in spoilt.model.modules())
    assert (theirs["skipped_steps"], theirs["kept_statistics"]) == (0, {})
    assert mine["train_loss"] == theirs["train_loss"]  # the mean of the others
    for name, value in spoilt.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    log = (spoilt.directory.path / "log.txt").read_text()
    assert "warning: optimizer steps left out because gradients were not finite: 1" in log
    assert "the training loss is not finite" not in log
    assert spoilt.run_epoch()["skipped_steps"] == 0


def test_skip_with_nothing_but_bad_mini_batches(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    made = trainer(tiny("local", nan_policy="skip"))
    good = made.data.train
    made.data.train = lambda *args: ((x * float("nan"), y) for x, y in good(*args))  # type: ignore[method-assign]
    entry = made.run_epoch()
    assert (entry["train_loss"], entry["skipped_steps"]) == (None, 6)
    assert all(torch.isfinite(value).all() for value in made.model.state_dict().values())


def test_report_goes_on_and_says_so(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    made = trainer(tiny("local"))
    spoil(made, 0, 2)
    entry = made.run_epoch()
    assert (entry["train_loss"], entry["skipped_steps"], entry["kept_statistics"]) == (None, 0, {})
    assert "running statistics are no longer finite" in (made.directory.path / "log.txt").read_text()


def test_raise_ends_the_run_before_anything_of_the_epoch_is_saved(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    config = tiny("local", nan_policy="raise")
    made = trainer(config)
    spoil(made, 1, 2)
    made.run_epoch()
    with pytest.raises(
        FloatingPointError, match=r"^epoch 2: the epoch loss is nan; running statistics are no longer finite .*: 0\.1"
    ):
        made.run_epoch()
    assert checkpoint.existing(tmp_path / "run") == [checkpoint.path_of(tmp_path / "run", 1)]
    again = trainer(config, resume=True)
    assert again.epoch == 1
    again.run_epoch()
    assert all(torch.isfinite(value).all() for value in again.model.state_dict().values())


def test_raise_ends_in_one_message(tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options: list[Any] = ["--method", "freeze", "--lr", "1e30", "--nan-policy", "raise"]
    assert main(["train", *tiny_flags, *options, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "Error: epoch 1: the epoch loss is nan" in shown
    assert f"--resume --out {out} repeats this one" in shown
    assert "Traceback" not in shown
    assert not checkpoint.existing(out)
