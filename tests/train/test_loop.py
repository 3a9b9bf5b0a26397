from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json, read_json_lines
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.measure import PHASES


def _run(trainer: Trainer) -> Trainer:
    while not trainer.done:
        trainer.run_epoch()
    trainer.finish()
    return trainer


def test_what_a_run_directory_holds(tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    config = tiny("local")
    _run(trainer(config))
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {
        *(".lock", "config.json", "environment.json", "log.txt", "metrics.jsonl", "summary.json", "model.pt", "tensorboard"),
        *("checkpoint-0003.ckpt", "checkpoint-0004.ckpt"),
    }
    assert RunConfig.from_json(read_json(run / "config.json")) == config
    environment = read_json(run / "environment.json")
    for key in ("python", "torch", "cpu", "threads", "git_commit", "localsgd_ext", "compiled_kernels"):
        assert key in environment
    assert environment["torch"] == torch.__version__
    metrics = read_json_lines(run / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4]
    assert "boundary 0 -> 2 of 14 layers" in (run / "log.txt").read_text()
    assert read_json(run / "summary.json")["last"] == metrics[-1]


def test_tensorboard_has_the_curves(tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(trainer(tiny("local")))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    metrics = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    accuracy = [(e.step, e.value) for e in events.Scalars("test_accuracy")]
    assert accuracy == [(m["epoch"], pytest.approx(m["test_accuracy"])) for m in metrics]
    assert {f"step_ms/{phase}" for phase in PHASES} <= set(events.Tags()["scalars"])


def test_without_tensorboard_all_else_is_there(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it now raises
    _run(trainer(tiny("local")))
    run = tmp_path / "run"
    assert not (run / "tensorboard").exists()
    assert "tensorboard is not installed: no curves are written for it" in (run / "log.txt").read_text()
    assert len(read_json_lines(run / "metrics.jsonl")) == 4


def test_memory_falls_where_the_boundary_moves_and_only_there(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    metrics = _run(trainer(tiny("local", epochs=6))).metrics
    assert [m["boundary"] for m in metrics] == [0, 0, 2, 2, 4, 4]
    memory = [m["saved_activation_bytes"] for m in metrics]
    assert memory[0] == memory[1] > memory[2] == memory[3] > memory[4] == memory[5]


def test_sgd_equals_a_plain_loop(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    """The baseline is nothing but PyTorch."""
    from localsgd_ext.train import data, models

    config = tiny("sgd", epochs=2, lr_schedule="cosine")
    made = _run(trainer(config))
    loaded = data.load(config)
    model = models.build(config.model, 10, config.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for epoch in range(2):
        for x, y in loaded.train(epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    for (name, mine), theirs in zip(made.model.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_freeze_leaves_the_prefix_alone_and_local_does_not(
    tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    for method, still in (("freeze", True), ("local", False)):
        made = trainer(tiny(method), method)
        made.run_epoch()
        made.run_epoch()
        weight = made.model.state_dict()["0.0.weight"].clone()
        made.run_epoch()
        assert made.metrics[-1]["boundary"] == 2
        assert torch.equal(weight, made.model.state_dict()["0.0.weight"]) == still


def test_the_local_rate_follows_the_config(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    config = tiny("local", local_lr=0.008, local_lr_decay=4.0, local_lr_decay_every=2, supervision="none")
    assert [m["local_lr"] for m in _run(trainer(config)).metrics] == [0.008, 0.008, 0.002, 0.002]


def test_options_reach_the_algorithm(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    metrics = _run(trainer(tiny("local", t_shift=3, l_max=0.3), "a")).metrics
    assert [m["boundary"] for m in metrics] == [0, 0, 0, 3]  # K = floor(4 * 3 / (0.3 * 14)) = 2
    assert _run(trainer(tiny("local", alpha=1e-9), "b")).metrics[-1]["boundary"] == 0
    assert _run(trainer(tiny("local", schedule="quadratic"), "c")).metrics[-1]["boundary"] > 2
    sampled = trainer(tiny("local", sample=0.25), "d")
    assert sampled.local is not None
    assert sampled.local._updater is not None
    assert sampled.local._updater.sample == 0.25
    for bn_stats, still in (("update", False), ("freeze", True)):
        made = trainer(tiny("freeze", bn_stats=bn_stats), bn_stats)
        for _ in range(2):
            made.run_epoch()
        mean = made.model.state_dict()["0.1.running_mean"].clone()
        made.run_epoch()
        assert made.metrics[-1]["boundary"] == 2
        assert torch.equal(mean, made.model.state_dict()["0.1.running_mean"]) == still


@pytest.mark.parametrize("method", ["freeze", "local"])
def test_a_refresh_costs_what_sgd_does(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer], method: str) -> None:
    """And the mini-batches between two of them what they do without."""
    sgd = _run(trainer(tiny("sgd"), "sgd")).metrics[-1]
    without = _run(trainer(tiny(method, schedule="quadratic"), "without")).metrics[-1]
    made = trainer(tiny(method, schedule="quadratic", refresh=3), "refresh")
    refreshed = _run(made).metrics[-1]
    steps = made.data.steps
    boundaries = [m["boundary"] for m in made.metrics]
    local_steps = steps * sum(b > 0 for b in boundaries)
    fresh = local_steps // 3 - (local_steps - steps) // 3  # in the last epoch
    expected = sgd["multiply_adds"] * fresh / steps + without["multiply_adds"] * (steps - fresh) / steps
    assert 0 < fresh < steps
    assert refreshed["boundary"] == without["boundary"] > 0
    assert refreshed["multiply_adds"] == pytest.approx(expected)
    assert without["multiply_adds"] < refreshed["multiply_adds"] < sgd["multiply_adds"]
    assert without["saved_activation_bytes"] < refreshed["saved_activation_bytes"] == sgd["saved_activation_bytes"]


def test_a_run_too_short_for_any_move_says_so(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    trainer(tiny("local", epochs=1))
    assert "warning: no layer will ever learn locally in this run" in (tmp_path / "run" / "log.txt").read_text()


def test_a_loss_that_is_not_finite_is_reported_and_the_json_stays_json(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    _run(trainer(tiny("sgd", lr=1e30, epochs=2)))
    assert "the training loss is not finite" in (tmp_path / "run" / "log.txt").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_bf16_and_channels_last(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    plain = _run(trainer(tiny("local"), "plain"))
    mixed = _run(trainer(tiny("local", amp="bf16", channels_last=True), "mixed"))
    assert mixed.model.state_dict()["1.conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    assert mixed.metrics[0]["saved_activation_bytes"] < plain.metrics[0]["saved_activation_bytes"]
    assert mixed.metrics[-1]["train_loss"] == pytest.approx(plain.metrics[-1]["train_loss"], rel=0.2, abs=0.05)


def test_warming_up_changes_nothing(tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]) -> None:
    made = trainer(tiny("local"))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    random = torch.get_rng_state()
    made.warm_up()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert made.run_epoch()["boundary"] == 0


def test_local_first_is_the_linear_schedule_backwards(
    tmp_path: Path, tiny: Callable[..., RunConfig], trainer: Callable[..., Trainer]
) -> None:
    forwards = _run(trainer(tiny("freeze", schedule="linear"), "forwards"))
    boundaries = [m["boundary"] for m in forwards.metrics]
    assert boundaries == sorted(boundaries)
    config = tiny("freeze", schedule="local-first")
    backwards = _run(trainer(config, "backwards"))
    assert [m["boundary"] for m in backwards.metrics] == boundaries[::-1]
    assert sum(m["multiply_adds"] for m in backwards.metrics) == sum(m["multiply_adds"] for m in forwards.metrics)

    stopped = trainer(config, "resumed")
    stopped.run_epoch()
    resumed = _run(trainer(config, "resumed", resume=True))
    assert [m["test_loss"] for m in resumed.metrics] == [m["test_loss"] for m in backwards.metrics]
