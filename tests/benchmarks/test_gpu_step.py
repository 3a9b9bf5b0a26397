"""benchmarks/gpu_step.py, as far as a CPU goes: parity gates timing, every dress takes the same steps, tables come from the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graph import RecordedGraphs

from benchmarks import dress as dresses
from benchmarks import gpu_step, gpu_step_tables, stages
from benchmarks.step_variants import Setting
from localsgd_ext import ops, trace_layers

FEW = ["--device", "cpu", "--networks", "resnet18", "--batches", "2", "--image", "8", "--depths", "0.5,0.75", "--seconds", "0"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(gpu_step, "STRETCH", 0)


def test_a_run_prints_what_its_file_holds_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    run = [*FEW, "--dresses", "eager", "--out", str(file)]
    assert gpu_step.main([*run, "--budget", "-1"]) == 3
    assert json.loads(file.read_text())["rows"] == {}
    assert gpu_step.main(run) == 2  # without --resume
    capsys.readouterr()
    assert gpu_step.main([*run, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert gpu_step.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == printed
    (row,) = json.loads(file.read_text())["rows"].values()
    assert set(row["ms"]) == {"sgd", "frozen 0.5", "local 0.5", "frozen 0.75", "local 0.75"}
    assert all(value > 0 for value in (*row["ms"].values(), *row["kernels_ms"].values()))
    assert row["boundaries"] == {"0.5": 10, "0.75": 15}
    assert row["saved_bytes"]["0"] > row["saved_bytes"]["0.5"] > row["saved_bytes"]["0.75"] > 0
    assert row["macs"]["sgd"] > row["macs"]["local 0.5"] > row["macs"]["frozen 0.5"] > row["macs"]["frozen 0.75"]
    assert row["kernels_how"] == dict.fromkeys(("0.5", "0.75"), "clock")
    assert set(row["peak_bytes"].values()) == {None}
    assert "resnet18 8 px b2 bf16 eager: 15/21" in printed
    assert "frozen, the default as on small_vgg" in printed


@pytest.mark.parametrize(("compiled", "graph"), [(True, False), (False, True), (True, True)])
def test_steps_in_a_dress_are_the_plain_ones(compiled: bool, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_through_dispatcher", lambda *tensors: True)  # or it would not be recorded
    recorders: list[RecordedGraphs] = []
    monkeypatch.setattr(dresses, "recorder", lambda _: recorders.append(RecordedGraphs([])) or recorders[-1])
    dress = dresses.Dress("cpu", "fp32", compiled, graph, "aot_eager")
    start, x, y = gpu_step.on("cpu", Setting("small_vgg", 16, 4, 10))
    torch.compiler.reset()
    errors = gpu_step.parity(dress, start, trace_layers(start, x), x, y, 4)
    assert max(errors.values()) < 2e-4
    for recorder in recorders:
        assert (recorder.warm_ups, recorder.replays) == (dresses.WARM_UPS, gpu_step.PARITY_STEPS - dresses.WARM_UPS)
    assert len(recorders) == graph


def test_what_is_compiled_is_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one class, of which some layers are frozen and some have hooks."""
    file = tmp_path / "step.json"
    run = [*FEW, "--dresses", "compiled", "--backend", "eager", "--dtype", "fp32", "--out", str(file)]
    assert gpu_step.main(run) == 0
    monkeypatch.setattr(dresses.Dress, "_compiled", lambda self, model: torch.compile(model, backend="eager"))
    file.unlink()
    assert gpu_step.main(run) == 1
    (row,) = json.loads(file.read_text())["rows"].values()
    assert row["status"] == "FAILED"
    assert "local 0.5: conv1 has not learnt" in row["failed"]


def test_sgd_is_captured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = RecordedGraphs([])
    monkeypatch.setattr(dresses, "recorder", lambda _: recorded)
    start, x, y = gpu_step.on("cpu", Setting("small_vgg", 8, 2, 10))
    variant = gpu_step.make("sgd", start, x, 0)
    weight = variant.model[0].weight
    step = dresses.Dress("cpu", "fp32", graph=True).step(variant, x, y)
    assert (recorded.warm_ups, recorded.replays) == (dresses.WARM_UPS, 0)
    before = weight.detach().clone()
    step()
    assert recorded.replays == 1
    assert not torch.equal(weight, before)


@pytest.mark.skipif(not ops.is_compiled(), reason="the reference is its own judge")
def test_a_wrong_step_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = ops.hebbian_update_

    def wrong(weight: torch.Tensor, x: torch.Tensor, z: torch.Tensor, lr: Any, **options: Any) -> None:
        original(weight, x, z, 1.05 * lr, **options)

    monkeypatch.setattr(ops, "hebbian_update_", wrong)
    file = tmp_path / "step.json"
    assert gpu_step.main([*FEW, "--dresses", "eager", "--out", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"].values()
    assert (row["status"], row["failed"]) == ("FAILED", "wrong: update")
    assert "ms" not in row
    assert (
        "FAILED, not timed: resnet18 8 px b2 bf16 eager: wrong: update (errors: update 5.0e-02 of 1.0e-02,"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--networks", "alexnet"], "--networks must be of resnet18"),
        (["--dresses", "eager,naked"], "--dresses must be of eager, eager+graph, compiled, compiled+graph, got naked"),
        (["--batches", "1"], "--batches must be at least 2"),
        (["--depths", "0.5,x"], "must be numbers"),
        (["--depths", "1.5"], r"--depths must be in (0, 1)"),
        (["--resume"], "--resume needs --out"),
    ],
)  # fmt: skip
def test_wrong_arguments(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_step.main(argv)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_what_cannot_be_measured_here_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main([*FEW, "--dresses", "compiled+graph"]) == 2
    assert "dresses with a graph need --device cuda" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_step.main(["--networks", "resnet18"]) == 2
    assert "a GPU is needed" in capsys.readouterr().err


def test_the_suite_runs_it() -> None:
    (command,) = stages.step(stages.Request(Path("/tmp/none"), 80.0))
    parsed = gpu_step.arguments(command.argv[2:])
    assert (parsed.device, parsed.budget, parsed.dtype) == ("cuda", 60, "bf16")
    assert parsed.batches == [64, 256]
    assert not parsed.resume


def test_speed_limits_and_runs() -> None:
    row = {
        "layers": 20, "boundaries": {"0.5": 10, "0.75": 15}, "kernels_ms": {"0.5": 10.0, "0.75": 20.0},
        "ms": {"sgd": 100.0, "frozen 0.5": 60.0, "local 0.5": 70.0, "frozen 0.75": 40.0, "local 0.75": 80.0},
    }  # fmt: skip
    assert gpu_step_tables.limit_ms(row, "0.5") == 70
    assert gpu_step_tables.of_limit(row, "0.5") == 1
    assert gpu_step_tables.of_limit(row, "0.75") == 0.75
    assert gpu_step_tables.step_ms(row, "frozen", 0) == 100
    assert gpu_step_tables.step_ms(row, "frozen", 0.25) == 80
    assert gpu_step_tables.step_ms(row, "frozen", 0.625) == 50
    assert gpu_step_tables.step_ms(row, "frozen", 0.9) == 40


def test_paths_of_the_boundary_are_what_committed_runs_took() -> None:
    linear, *measured = gpu_step_tables.measured_paths()
    assert (len(linear["shares"]), linear["shares"][0], max(linear["shares"])) == (90, 0, 0.74)
    assert [path["name"] for path in measured] == [
        f"frozen, the default as on {name}" for name in ("small_resnet", "small_vgg")
    ]
    for path in measured:
        assert path["shares"][0] == 0
        assert sorted(path["shares"]) == path["shares"]
        assert 0.25 < path["shares"][-1] <= 0.75
        assert path["points"].startswith("-0.")
