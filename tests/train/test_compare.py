from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from localsgd_ext.__main__ import main
from localsgd_ext.train import compare, report
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.measure import PHASES


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison made once through the command line, on scans of digits."""
    out = tmp_path_factory.mktemp("compare") / "out"
    options = (
        "--data digits --model small_resnet --methods sgd,freeze,local --seeds 2 --epochs 5 --train-size 128 --test-size 60"
    )
    more = "--image-size 8 --batch-size 16 --lr 0.02 --alpha 9 --device cpu"
    torch.set_num_threads(1)
    assert main(["compare", *options.split(), *more.split(), "--out", str(out)]) == 0
    return out


def test_what_it_writes(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    runs = {f"{method}-seed{seed}" for method in ("sgd", "freeze", "local") for seed in (0, 1)}
    assert names == {".lock", "compare.json", "table.json", "table.md", "picture.png", "picture.svg", *runs}
    assert (finished / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (finished / "picture.svg").read_bytes()


def test_the_numbers_are_those_of_the_runs(finished: Path) -> None:
    summary = json.loads((finished / "table.json").read_text())
    assert [row["method"] for row in summary["methods"]] == ["sgd", "freeze", "local"]
    sgd, freeze, local = summary["methods"]
    epochs = {
        (method, seed): [
            json.loads(line) for line in (finished / f"{method}-seed{seed}" / "metrics.jsonl").read_text().splitlines()
        ]
        for method in ("sgd", "freeze", "local")
        for seed in (0, 1)
    }
    last = {run: metrics[-1] for run, metrics in epochs.items()}
    steps = {run: sum(epoch["step_ms"][phase] for epoch in metrics for phase in PHASES) for run, metrics in epochs.items()}
    gain = [100 * (last["local", s]["test_accuracy"] - last["sgd", s]["test_accuracy"]) for s in (0, 1)]
    assert local["minus_sgd_points"]["values"] == pytest.approx(gain)
    assert local["minus_sgd_points"]["mean"] == pytest.approx(sum(gain) / 2)
    assert local["minus_sgd_points"]["std"] == pytest.approx(abs(gain[0] - gain[1]) / 2**0.5)
    ratio = [steps["sgd", s] / steps["freeze", s] for s in (0, 1)]
    assert freeze["speed_up"]["values"] == pytest.approx(ratio)
    assert sgd["speed_up"] is None
    assert sgd["minus_sgd_points"] is None
    assert (sgd["boundary"], freeze["boundary"], local["boundary"]) == ([0], [4], [4])
    assert local["num_layers"] == 14
    assert local["saved_mib_last"] < local["saved_mib_mean"] < sgd["saved_mib_mean"] == sgd["saved_mib_last"]
    assert set(local["step_ms"]) == set(PHASES)


def test_runs_of_a_seed_are_paired(finished: Path) -> None:
    """Until the boundary first moves, all methods are one: same weights, same data, same losses."""

    def metrics(method: str, seed: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (finished / f"{method}-seed{seed}" / "metrics.jsonl").read_text().splitlines()]

    def losses(method: str, seed: int) -> list[float]:
        return [m["train_loss"] for m in metrics(method, seed)]

    for seed in (0, 1):
        assert losses("sgd", seed)[:2] == losses("freeze", seed)[:2] == losses("local", seed)[:2]
        assert losses("sgd", seed)[2:] != losses("freeze", seed)[2:] != losses("local", seed)[2:]
    assert losses("sgd", 0) != losses("sgd", 1)


def test_epochs_are_interleaved_in_rotating_order(finished: Path) -> None:
    """The order in which the metrics of seed 0 were written is the order in which the epochs ran."""
    events = [
        (line[:19], method, line.split("  ")[0])
        for method in ("sgd", "freeze", "local")
        for line in (finished / f"{method}-seed0" / "log.txt").read_text().splitlines()
        if " accuracy " in line
    ]
    times = {(method, epoch.split()[-1]): stamp for stamp, method, epoch in events}
    for method in ("sgd", "freeze", "local"):
        assert times[method, "1/5"] <= min(times[other, "2/5"] for other in ("sgd", "freeze", "local"))
    assert [compare._rotated(["a", "b", "c"], by) for by in range(4)] == [  # type: ignore[list-item]
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_report_rebuilds_table_and_pictures_from_json_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (finished / name).read_bytes() for name in ("table.json", "table.md")}
    for path in list(finished.rglob("*")):
        if path.is_file() and path.suffix not in (".json", ".jsonl"):
            path.unlink()
    (finished / "table.json").unlink()
    assert main(["report", str(finished)]) == 0
    assert {name: (finished / name).read_bytes() for name in before} == before
    assert (finished / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "minus SGD, points" in capsys.readouterr().out


def test_report_of_a_single_run(finished: Path) -> None:
    run = finished / "local-seed0"
    assert main(["report", str(run)]) == 0
    (row,) = json.loads((run / "table.json").read_text())["methods"]
    assert row["accuracy_percent"]["std"] is None
    assert row["speed_up"] is None
    assert "| local |" in (run / "table.md").read_text()


def test_an_interrupted_comparison_continues(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["compare", *tiny_flags, "--seeds", "2", "--methods", "sgd,local"]
    assert main([*options, "--out", str(tmp_path / "straight")]) == 0

    whole, count = Trainer.run_epoch, 0

    def interrupted(self: Trainer) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 12:  # seed 0 took 8 epochs; this is in the middle of seed 1
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", interrupted)
        assert main([*options, "--out", str(tmp_path / "stopped")]) == 130
    assert "Continue with --resume --out" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "stopped")]) == 0  # of what is finished
    assert main(["compare", "--resume", "--out", str(tmp_path / "stopped")]) == 0
    for run in ("sgd-seed0", "sgd-seed1", "local-seed0", "local-seed1"):
        one, other = (torch.load(tmp_path / d / run / "model.pt", weights_only=True) for d in ("straight", "stopped"))
        assert all(torch.equal(one[name], other[name]) for name in one), run

    assert main(["compare", "--resume", "--out", str(tmp_path / "stopped"), "--lr", "0.3"]) == 2
    assert "--lr: 0.02 -> 0.3" in capsys.readouterr().err
    assert main(["compare", "--resume", "--out", str(tmp_path / "stopped"), "--seeds", "3"]) == 2
    assert "compares sgd, local over seeds [0, 1], asked for sgd, local over seeds [0, 1, 2]" in capsys.readouterr().err


def test_the_table_as_text(tiny: Callable[..., RunConfig]) -> None:
    """Every cell from numbers written here."""

    def run(method: str, seed: int, accuracy: float, seconds: float, backward: float, boundary: int) -> report.Run:
        entry = {
            "num_layers": 14,
            "train_images": 96,
            "test_images": 40,
            "step_ms": {"data": 0.5, "forward": 10.0, "backward": 20.0, "optimizer": 1.0},
        }
        first = {**entry, "epoch": 1, "test_accuracy": 0.1, "elapsed_train_seconds": 1.0, "boundary": 0}
        last = {**entry, "epoch": 2, "test_accuracy": accuracy, "elapsed_train_seconds": seconds, "boundary": boundary}
        last["step_ms"] = {"data": 0.5, "forward": 10.0, "backward": backward, "optimizer": 1.0}
        metrics = [{**first, "saved_activation_bytes": 4 << 20}, {**last, "saved_activation_bytes": 2 << 20}]
        environment = {"gpu": None, "cpu": "A CPU", "threads": 2, "torch": "2.0", "localsgd_ext": "1.0"}
        return report.Run(tiny(method, seed=seed), {**environment, "compiled_kernels": True, "git_commit": None}, metrics)

    runs = [
        run("sgd", 0, 0.80, 30.0, 10.0, 0),
        run("sgd", 1, 0.90, 50.0, 10.0, 0),
        run("local", 0, 0.79, 20.0, 2.0, 8),
        run("local", 1, 0.91, 40.0, 6.0, 10),
    ]
    summary = report.summarize(runs)
    sgd, local = "26.5 (0.5 + 10.0 + 15.0 + 1.0)", "23.5 (0.5 + 10.0 + 12.0 + 1.0)"
    assert report.table(summary) == [
        ("sgd", "85.00 ± 7.07", "-", "40.0 ± 14.1", "-", sgd, "21.5", "3.0 / 2.0", "0/14"),
        ("local", "85.00 ± 8.49", "+0.00 ± 1.41", "30.0 ± 14.1", "1.13x ± 0.07", local, "15.5", "3.0 / 2.0", "8-10/14"),
    ]
    assert report.markdown(summary).count("\n|") == 3
    assert "seeds 0, 1; mean ± standard deviation over seeds" in report.caption(summary)
    assert "small_resnet on fake: 96 training and 40 test pictures, 4 epochs, batch 16" in report.caption(summary)
    assert "A CPU, 2 threads" in report.caption(summary)


def test_the_other_methods_can_be_compared_too(tmp_path: Path, tiny_flags: list[str]) -> None:
    methods = ["sgd", "stochastic-depth", "prunetrain"]
    out = tmp_path / "out"
    assert main(["compare", *tiny_flags, "--epochs", "2", "--methods", ",".join(methods), "--out", str(out)]) == 0
    rows = json.loads((out / "table.json").read_text())["methods"]
    assert [row["method"] for row in rows] == methods
    assert [row["boundary"] for row in rows] == [[0]] * 3
    first = [json.loads((out / f"{method}-seed0" / "metrics.jsonl").read_text().splitlines()[0]) for method in methods]
    assert [entry["lr"] for entry in first] == [0.02] * 3
    assert first[1]["multiply_adds"] < first[0]["multiply_adds"] == first[2]["multiply_adds"]
    svg = (out / "picture.svg").read_bytes()
    assert svg.endswith(b"</svg>\n")
