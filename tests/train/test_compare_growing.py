"""``localsgd compare`` with options that methods without a boundary do not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from same_runs import assert_same_run
from torch._subclasses.fake_tensor import FakeTensorMode

from localsgd_ext.__main__ import main
from localsgd_ext.batch_growth import SavedMemory
from localsgd_ext.train import loop, report
from localsgd_ext.train.compare import Comparison, left_out, options_for
from localsgd_ext.train.config import resolve
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.growing import MiniBatch
from localsgd_ext.train.loop import Trainer

# As in test_growing.py: at 3.8 MB the tiny run's batch doubles after its second epoch.
GROWING = ["--memory-budget", "3.8MB", "--max-batch-size", "40", "--lr-scaling", "sqrt", "--nan-policy", "skip"]
NOT_FOR_SGD = "--nan-policy, --memory-budget, --max-batch-size, --lr-scaling: not for sgd, without a boundary"


def _sizes(path: Path) -> list[int]:
    return [entry["batch_size"] for entry in read_json_lines(path / "metrics.jsonl")]


def test_the_methods_that_can_take_them_do(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as it trains alone; and going on after an interruption, in the epoch after the batch has grown."""
    for method, options in (("sgd", []), ("freeze", GROWING), ("refresh", GROWING)):
        command = ["train", *tiny_flags, *options, "--method", method, "--out", str(tmp_path / method)]
        assert main(command) == 0
    capsys.readouterr()

    whole, out, count = Trainer.run_epoch, tmp_path / "compare", 0

    def interrupted(self: Trainer) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 9:  # three methods: in the third epoch
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", interrupted)
        assert main(["compare", *tiny_flags, *GROWING, "--methods", "sgd,freeze,refresh", "--out", str(out)]) == 130
    assert capsys.readouterr().out.count(NOT_FOR_SGD) == 1
    assert main(["compare", "--resume", "--out", str(out), "--memory-budget", "3800kB"]) == 0
    assert capsys.readouterr().out.count(NOT_FOR_SGD) == 1

    for method in ("sgd", "freeze", "refresh"):
        assert_same_run(tmp_path / method, out / f"{method}-seed0")
    assert [_sizes(out / f"{m}-seed0") for m in ("sgd", "freeze", "refresh")] == [[16] * 4, [16, 16, 32, 32], [16] * 4]
    note = (
        "batch 16 (freeze grown to 32, refresh not grown in 3.6 MiB of each device, learning rate with it (sqrt); "
        "sgd without a boundary: the same batch), seed 0"
    )
    assert note in (out / "table.md").read_text()

    for option, value, change in (
        ("--memory-budget", "4MB", "3800000 -> 4000000"),
        ("--lr-scaling", "linear", "sqrt -> linear"),
        ("--nan-policy", "raise", "skip -> raise"),
        ("--max-batch-size", "64", "40 -> 64"),
    ):
        assert main(["compare", "--resume", "--out", str(out), option, value]) == 2
        assert f"freeze in {out} was started with other options: {option}: {change}" in capsys.readouterr().err


def test_resuming_with_other_methods_says_which(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """And not that they cannot have the options of those there are."""
    out = tmp_path / "out"
    options = [*tiny_flags, "--epochs", "1", *GROWING]
    assert main(["compare", *options, "--methods", "freeze", "--out", str(out)]) == 0
    assert "not for" not in capsys.readouterr().out
    assert "batch 16 (which did not grow in 3.6 MiB of each device, " in (out / "table.md").read_text()
    for methods in ("sgd", "refresh,freeze"):
        assert main(["compare", "--resume", "--out", str(out), "--methods", methods]) == 2
        assert f"compares freeze over seeds [0], asked for {', '.join(methods.split(','))} over" in capsys.readouterr().err


def test_what_a_method_does_by_default_was_not_asked_of_the_others() -> None:
    def compared(*methods: str, **flags: Any) -> Comparison:
        made = {m: resolve("digits", "small_resnet", m, **options_for(m, methods, flags)) for m in methods}
        return Comparison(made, seeds=(0,))

    assert left_out(compared("sgd", "freeze", "refresh")) is None
    assert left_out(compared("freeze", "refresh", refresh=2)) is None
    asked = compared("sgd", "freeze", "refresh", refresh=2, min_loss_drop=0.2, bn_stats="freeze")
    assert left_out(asked) == "--refresh, --min-loss-drop, --bn-stats: not for sgd, without a boundary"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "sgd,prunetrain", "--nan-policy", "skip"], "--nan-policy skip needs one of the methods freeze, "),
        (["--methods", "sgd", "--refresh", "2"], "--refresh 2 needs one of the methods freeze, "),
        (["--methods", "sgd", "--memory-budget", "1GB"], "--memory-budget needs one of the methods freeze, "),
        (["--methods", "sgd,freeze", "--max-batch-size", "64"], "--max-batch-size 64 needs --memory-budget"),
        (["--methods", "sgd,freeze", "--nan-policy", "ignore"], "--nan-policy must be one of report, skip, raise"),
    ],
)
def test_refused(
    options: list[str], message: str, tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compare", *tiny_flags, *options, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_raise_names_the_run_that_ends_the_comparison(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--methods", "sgd,freeze", "--lr", "1e30", "--nan-policy", "raise"]
    assert main(["compare", *tiny_flags, *options, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert "Error: freeze seed 0: epoch 1: the epoch loss is nan" in shown
    assert f"--resume --out {out} repeats this one" in shown
    assert _sizes(out / "sgd-seed0") == [16]


def _run(method: str, medians: list[float], sizes: list[int] | None, **options: Any) -> report.Run:
    """Of 96 pictures, with steps of so many milliseconds."""
    entry = {"num_layers": 14, "boundary": 0, "train_images": 96, "test_images": 40, "test_accuracy": 0.5}
    entry |= {"elapsed_train_seconds": 1.0, "saved_activation_bytes": 0}
    metrics = [{**entry, "step_ms": {"data": 0.0, "forward": ms, "backward": 0.0, "optimizer": 0.0}} for ms in medians]
    if sizes is not None:
        metrics = [{**m, "batch_size": size, "mini_batches": 96 // size} for m, size in zip(metrics, sizes, strict=True)]
    config = resolve("fake", "small_resnet", method, batch_size=16, epochs=len(medians), **options)
    about = {"gpu": None, "cpu": "A CPU", "threads": 2, "torch": "2.0", "localsgd_ext": "1.0"}
    return report.Run(config, {**about, "compiled_kernels": True, "git_commit": None}, metrics)


def test_the_speed_up_counts_fewer_steps_where_the_batch_grew() -> None:
    """Steps of twice the pictures, twice as long: no gain. Runs from before it could grow do not say how many there were."""
    sgd = _run("sgd", [10.0, 10.0, 10.0], None)
    freeze = _run("freeze", [10.0, 20.0, 20.0], [16, 32, 32], memory_budget=2**20)
    local = _run("local", [10.0, 10.0, 10.0], [16, 32, 32], memory_budget=2**20)
    summary = report.summarize([sgd, freeze, local])
    ratios = [row["speed_up"]["mean"] for row in summary["methods"][1:]]
    assert ratios == pytest.approx([1.0, (6 + 6 + 6) / (6 + 3 + 3)])
    assert "batch 16 (freeze and local grown to 32 in 1.0 MiB of each device; sgd without a boundary: the same batch)" in (
        report.caption(summary)
    )
    grown_alike = report.summarize([freeze, local])
    assert "batch 16 (grown to 32 in 1.0 MiB of each device)" in report.caption(grown_alike)


def test_on_a_gpu_the_other_methods_networks_do_not_count(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peaks there are those of all methods, of which a resumed comparison may have fewer. What a step saves is its own."""
    made: list[MiniBatch] = []
    with FakeTensorMode():  # a tensor on a GPU that need not be there
        example = torch.empty(2, 3, 8, 8, device="cuda")

    def on_a_gpu(config: Any, local: Any, scheduler: Any, _: Any, *args: Any, **options: Any) -> MiniBatch:
        made.append(MiniBatch(config, local, scheduler, example, *args, **options))
        return made[-1]

    def stop(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "MiniBatch", on_a_gpu)
    monkeypatch.setattr(Trainer, "warm_up", stop)
    out = str(tmp_path / "out")
    assert main(["compare", *tiny_flags, "--methods", "freeze", "--memory-budget", "1MB", "--out", out]) == 130
    (batch,) = made
    assert batch._growth is not None
    assert isinstance(batch._growth._measure, SavedMemory)
    assert batch._peaks is None
