"""Stopping a run, however rudely, and going on: the same bits come out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same_runs import assert_same_run, weights

from localsgd_ext.train import checkpoint
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.loop import Trainer


def test_killed_at_random_moments(tmp_path: Path, soak: bool) -> None:
    """Any number of times, by the clock or at a flush to disk, with any method: the run ends as if nothing had happened."""
    trials, seed = (50, 1) if soak else (5, 0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("kill.py")), str(tmp_path), str(trials), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * trials)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == trials
    kills = [kill for trial in found for kill in trial["kills"]]
    assert len(kills) >= trials
    assert len({kill["epochs"] for kill in kills}) >= 3
    changing = {trial["method"].split()[1]: trial["changed"] for trial in found}
    assert changing == {
        "local": True, "prunetrain": True, "freeze": True, "stochastic-depth": False, "sgd": False
    }  # fmt: skip


def test_kill_in_mid_epoch_then_resume(tmp_path: Path, tiny_flags: list[str]) -> None:
    """In processes of their own, from the command line."""
    after = 3  # the boundary has moved after epoch 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = [*tiny_flags, "--train-size", "960", "--epochs", "6", "--local-lr", "0.001"]

    def command(out: str, *more: str) -> list[str]:
        return [sys.executable, "-W", "ignore", "-m", "localsgd_ext", "train", "--out", str(tmp_path / out), *more]

    undisturbed = subprocess.Popen(command("undisturbed", *options), env=environment, stdout=subprocess.PIPE)
    victim = subprocess.Popen(command("killed", *options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 300
    while not checkpoint.path_of(killed, after).exists():
        assert victim.poll() is None, victim.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(0.03)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    last = read_json_lines(killed / "metrics.jsonl")[-1]["epoch"]  # ``after``, unless this process was kept waiting
    assert after <= last < 6
    assert not (killed / "model.pt").exists()

    resumed = subprocess.run(command("killed", "--resume"), env=environment, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert " of 6" in next(line for line in resumed.stdout.splitlines() if "resuming after epoch" in line)
    undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0
    assert_same_run(tmp_path / "undisturbed", killed)
    assert read_json_lines(killed / "metrics.jsonl")[-1]["boundary"] > 0


@pytest.mark.parametrize("method", ["sgd", "freeze", "local", "stochastic-depth", "prunetrain"])
def test_resuming_after_every_epoch(
    method: str, tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    """Also with an older checkpoint: metrics written after it are forgotten and measured again."""
    config = tiny(method, lr_schedule="step", lr_step=2)
    straight = trainer(config, "straight")
    while not straight.done:
        straight.run_epoch()
    straight.finish()

    trainer(config, "stopped").run_epoch()
    for finished in (1, 2, 3):
        going_on = trainer(config, "stopped", resume=True)
        assert going_on.epoch == finished
        going_on.run_epoch()
    newest = checkpoint.path_of(tmp_path / "stopped", 4)
    newest.write_bytes(newest.read_bytes()[:-100])
    again = trainer(config, "stopped", resume=True)
    assert again.epoch == 3
    assert [m["epoch"] for m in again.metrics] == [1, 2, 3]
    assert "is damaged" in (tmp_path / "stopped" / "log.txt").read_text()
    again.run_epoch()
    again.finish()
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_checkpoint_of_another_run_is_not_used(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    other = trainer(tiny("sgd", lr=0.5), "other")
    other.run_epoch()
    mine = trainer(tiny("sgd"), "mine")
    (tmp_path / "mine" / "checkpoint-0001.ckpt").write_bytes((tmp_path / "other" / "checkpoint-0001.ckpt").read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match=r"is of another run: lr 0.5 instead of 0.02"):
        mine.restore()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    trainer(tiny("local"), "run")
    assert trainer(tiny("local"), "run", resume=True).epoch == 0


def test_half_written_files_of_a_killed_run_are_cleared_away(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.a1b2c3.tmp").write_text("{")  # killed while it wrote its first file: a new run may begin
    trainer(tiny("sgd"), "run").run_epoch()
    (run / ".checkpoint-0002.ckpt.d4e5f6.tmp").write_bytes(b"half")
    assert trainer(tiny("sgd"), "run", resume=True).epoch == 1
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_checkpoint_without_its_metrics(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    trainer(tiny("sgd"), "run").run_epoch()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"the checkpoint is of epoch 1, but metrics.jsonl has 0 epochs"):
        trainer(tiny("sgd"), "run", resume=True)


def test_dropout_and_interleaving_do_not_disturb_each_other(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs in one process, epoch by epoch, are the two runs alone; with a network that draws random numbers."""
    from localsgd_ext.train import models

    def with_dropout(num_classes: int) -> Any:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(144, num_classes)
        )

    monkeypatch.setitem(models.MODELS, "small_resnet", with_dropout)
    config = tiny("sgd", epochs=2)
    alone = trainer(config, "alone")
    while not alone.done:
        alone.run_epoch()
    alone.finish()
    one, two = trainer(config, "one"), trainer(config.replace(seed=1), "two")
    for _ in range(2):
        one.run_epoch()
        two.run_epoch()
    one.finish()
    two.finish()
    assert_same_run(tmp_path / "alone", tmp_path / "one")
    assert not torch.equal(weights(tmp_path / "one")["0.weight"], weights(tmp_path / "two")["0.weight"])
