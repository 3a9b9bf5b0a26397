"""``localsgd train --memory-budget``: the batch doubles where the boundary has freed the memory, and stays so over a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from same_runs import assert_same_run

from localsgd_ext import step_memory
from localsgd_ext.__main__ import main
from localsgd_ext.train import checkpoint
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.growing import MiniBatch
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.processes import World

# The tiny run's boundaries are 0, 0, 2, 2, 4, 4. 32 pictures take 4.2 MB at boundary 0 and 3.8 at 2; 64 of them 5.5 and, at 4, 4.4.
BUDGET = 3_800_000
GROWING: dict[str, Any] = {"epochs": 6, "memory_budget": BUDGET}
SIZES = [16, 16, 32, 32, 32, 32]


def _run(trainer: Trainer) -> list[dict[str, Any]]:
    while not trainer.done:
        trainer.run_epoch()
    trainer.finish()
    return trainer.metrics


def _column(metrics: list[dict[str, Any]], name: str) -> list[Any]:
    return [entry[name] for entry in metrics]


def test_the_batch_doubles_where_the_boundary_has_freed_the_memory(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    plain = _run(trainer(tiny("freeze", epochs=6), "plain"))
    made = trainer(tiny("freeze", **GROWING), "growing")
    growing = _run(made)
    assert _column(growing, "boundary") == _column(plain, "boundary") == [0, 0, 2, 2, 4, 4]
    assert _column(plain, "batch_size") == [16] * 6
    assert _column(growing, "batch_size") == SIZES
    assert _column(growing, "mini_batches") == [6, 6, 3, 3, 3, 3]
    assert _column(growing, "multiply_adds") == _column(plain, "multiply_adds")  # an epoch has the same pictures
    assert _column(growing, "lr") == _column(plain, "lr")
    saved = _column(growing, "saved_activation_bytes")
    assert saved[2] == pytest.approx(2 * plain[2]["saved_activation_bytes"], rel=0.01)  # statistics of a batch do not double

    # What was predicted after the second epoch is what a step of the third took.
    assert made.local is not None
    plan = made.local.plan
    frozen = {name for name, position in plan.parameters.items() if position < plan.parameters[f"{plan.layers[2]}.weight"]}
    parameters, learning = (
        sum(p.nbytes for name, p in made.model.named_parameters() if name not in left_out) for left_out in ((), frozen)
    )
    constant = parameters + sum(b.nbytes for b in made.model.buffers()) + 2 * learning  # gradients and momentum
    assert growing[1]["predicted_bytes"] - constant == pytest.approx(saved[2], rel=0.01)
    assert growing[1]["predicted_bytes"] <= BUDGET < growing[0]["predicted_bytes"]
    log = (tmp_path / "growing" / "log.txt").read_text()
    assert log.count("batch 16 -> 32: on each device a step is predicted to take 3.6 MiB of 3.6 MiB") == 1
    assert "warning" not in log


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 2), ("sqrt", 2**0.5)])
def test_the_learning_rate_may_grow_with_it(
    scaling: str, factor: float, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    plain = _run(trainer(tiny("freeze", **GROWING), "plain"))
    made = trainer(tiny("freeze", **GROWING, lr_scaling=scaling), "scaled")
    scaled = _run(made)
    factors = [1, 1, *[factor] * 4]
    assert _column(scaled, "lr") == pytest.approx([f * lr for f, lr in zip(factors, _column(plain, "lr"), strict=True)])
    assert made._scheduler.base_lrs == pytest.approx([0.02 * factor])


def test_after_the_last_epoch_it_does_not_grow(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    """Where it would before: nobody trains with it."""
    made = trainer(tiny("freeze", **{**GROWING, "epochs": 2, "memory_budget": 2**40}))
    metrics = _run(made)
    assert made.batch.size == 32
    assert (tmp_path / "run" / "log.txt").read_text().count("batch 16 -> 32") == 1
    assert "batch 32 -> 64" not in (tmp_path / "run" / "log.txt").read_text()
    assert [value is None for value in _column(metrics, "predicted_bytes")] == [False, True]


def test_a_largest_batch(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    enough = {**GROWING, "memory_budget": 2**40}
    assert _column(_run(trainer(tiny("freeze", **enough), "all")), "batch_size") == [16, 32, 64, 64, 64, 64]  # of 96 pictures
    assert _column(_run(trainer(tiny("freeze", **enough, max_batch_size=40), "cap")), "batch_size") == [16, *[32] * 5]


def test_the_time_left_knows_what_larger_mini_batches_leave_out(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 96 pictures a mini-batch of 64 leaves out 32."""
    made = trainer(tiny("freeze", **{**GROWING, "memory_budget": 2**40}))
    done: list[int] = []
    monkeypatch.setattr(made.progress, "advance", done.append)
    assert _column(_run(made), "mini_batches") == [6, 3, 1, 1, 1, 1]
    assert sum(done) == 6 * 96


def test_with_a_refresh_it_grows_only_where_sgds_could(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    metrics = _run(trainer(tiny("freeze", **GROWING, refresh=2)))
    assert _column(metrics, "batch_size") == [16] * 6
    assert metrics[-1]["boundary"] == 4
    assert "warning: with --refresh the batch grows only where SGD's could" in (tmp_path / "run" / "log.txt").read_text()


def test_autocast_is_measured(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    """In bf16 what is saved is half, but for copies of the weights: it fits earlier."""
    predicted = {
        amp: trainer(tiny("freeze", **GROWING, amp=amp), amp).run_epoch()["predicted_bytes"] for amp in ("none", "bf16")
    }
    assert predicted["bf16"] < 0.95 * predicted["none"]


@pytest.mark.parametrize("method", ["freeze", "local"])
def test_resuming_after_every_epoch(
    method: str, tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    """Before it grows, right after, and later; also with an older checkpoint, of before."""
    config = tiny(method, **GROWING, lr_scaling="linear", lr_schedule="step", lr_step=2, nan_policy="skip")
    straight = _run(trainer(config, "straight"))
    assert _column(straight, "batch_size") == SIZES
    trainer(config, "stopped").run_epoch()
    for finished in (1, 2):
        trainer(config, "stopped", resume=True).run_epoch()
        assert checkpoint.path_of(tmp_path / "stopped", finished + 1).exists()
    newest = checkpoint.path_of(tmp_path / "stopped", 3)
    newest.write_bytes(newest.read_bytes()[:-100])
    for size in SIZES[2:]:
        going_on = trainer(config, "stopped", resume=True)
        assert going_on.run_epoch()["batch_size"] == size
    going_on.finish()
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_resuming_with_another_number_of_processes(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    """The mini-batch stays, their shares of it change."""
    config = tiny("freeze", **GROWING)
    alone = trainer(config)
    for _ in range(3):
        alone.run_epoch()
    state = alone.batch.state_dict()
    assert state == {"format": 1, "batch_size": 32, "growths": 1}
    example = torch.zeros(8, 3, 8, 8)
    shared = MiniBatch(config, alone.local, alone._scheduler, example, 96, World(1, 2))
    assert (shared.size, shared._share.batch_size) == (16, 8)
    shared.load_state_dict(state)
    assert (shared.size, shared._share.batch_size) == (32, 16)


def test_a_checkpoint_from_before_the_batch_could_grow(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    """It knows neither the options nor the batch."""
    trainer(tiny("local"), "run").run_epoch()
    path = checkpoint.path_of(tmp_path / "run", 1)
    config = tiny("local")
    _, state = checkpoint.load(path, config.identity())
    del state["batch"]
    new = ("bn_stats", "nan_policy", "memory_budget", "max_batch_size", "lr_scaling", "sync")
    old = {name: value for name, value in config.identity().items() if name not in new}
    checkpoint.save(tmp_path / "run", 1, old, state)
    assert trainer(config, "run", resume=True).epoch == 1
    other = config.replace(nan_policy="skip")
    with pytest.raises(checkpoint.CheckpointError, match="nan_policy 'report' instead of 'skip'"):
        checkpoint.load(path, other.identity(), RunConfig.defaults())


def test_peaks_of_a_gpu_are_those_of_the_whole_epoch(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    """``BatchGrowth`` reads and resets them after every step; made-up counters."""
    made = trainer(tiny("freeze"))
    cuda = torch.device("cuda")
    peak = 0

    def reset(device: torch.device) -> None:
        nonlocal peak
        peak = 0

    monkeypatch.setattr(step_memory, "device_of", lambda local: cuda)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    example: Any = SimpleNamespace(device=cuda)
    batch = MiniBatch(tiny("freeze", **GROWING), made.local, made._scheduler, example, 96, World())
    for peak_of_step in (700, 900, 800):
        peak = peak_of_step
        made.optimizer.step()
    peak = 100  # an evaluation
    assert batch.peak_device_bytes(cuda) == 900
    assert batch.peak_device_bytes(torch.device("cpu")) is None
    batch.begin_epoch()
    assert batch.peak_device_bytes(cuda) == 100
    batch.remove()
    peak = 5000
    made.optimizer.step()
    assert (batch.peak_device_bytes(cuda), peak) == (5000, 5000)  # no longer reset


def test_from_the_command_line(tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    growing = ["--method", "local", "--memory-budget", "3.8MB", "--lr-scaling", "linear", "--nan-policy", "skip"]
    assert main(["train", *tiny_flags, *growing, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert "prefix 0/14  batch 16  " in lines[1]
    assert "prefix 2/14  batch 32  " in lines[2]
    assert "left 0 s" in lines[-1]
    assert "batch 16 -> 32" in shown
    assert "batch 16 (grown to 32 in 3.6 MiB of each device, learning rate with it (linear))" in (out / "table.md").read_text()
    for option, values in (
        ("--memory-budget", ("4MB", "3800000 -> 4000000")),
        ("--lr-scaling", ("none", "linear -> none")),
        ("--nan-policy", ("raise", "skip -> raise")),
        ("--max-batch-size", ("64", "None -> 64")),
    ):
        assert main(["train", "--resume", "--out", str(out), option, values[0]]) == 2
        assert f"was started with other options: {option}: {values[1]}" in capsys.readouterr().err
    assert main(["report", str(out)]) == 0
    assert main(["train", "--resume", "--out", str(out), "--memory-budget", "3800kB"]) == 0
