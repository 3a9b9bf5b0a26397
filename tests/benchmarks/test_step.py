"""benchmarks/step.py: parity gates timing, tables come from the file, the verdicts follow from the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, step_tables, step_variants
from localsgd_ext import ops, trace_layers
from localsgd_ext.folding import Fold

pytestmark = pytest.mark.filterwarnings("default::UserWarning")
FEW = ["--networks", "resnet18", "--batch", "2", "--image", "8", "--depths", "0.5", "--layouts", "nhwc", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CALLS_ALONE", 3)
    monkeypatch.setattr(step, "LEAST_ROUNDS", 1)


def test_a_run_prints_what_its_file_holds_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    assert step.main([*FEW, "--out", str(file), "--budget", "-1"]) == 3
    assert json.loads(file.read_text())["rows"] == {}
    assert step.main([*FEW, "--out", str(file)]) == 2
    capsys.readouterr()
    assert step.main([*FEW, "--out", str(file), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert step.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == printed
    (row,) = json.loads(file.read_text())["rows"].values()
    assert list(row["ms"]) == list(step_variants.VARIANTS)
    for phases in row["ms"].values():
        assert phases["step"] >= phases["forward"] >= phases["hooks"] >= 0
    assert {name for name, phases in row["ms"].items() if not phases["hooks"]} == {"sgd", *step_variants.BN_STATS}
    assert row["hook_us"] > 0
    assert len(row["over_frozen_ms"]) >= 1
    assert set(row["kernel_us"]) == set(trace_layers(*_resnet()).layers[: row["boundary"]])
    assert "resnet18 8 px b2 nhwc 10/21" in printed


def _resnet() -> tuple[torch.nn.Module, torch.Tensor]:
    setting = step_variants.Setting("resnet18", 8, 2, 10)
    return step_variants.network(setting, "nchw"), step_variants.example(setting, "nchw")[0]


@pytest.mark.skipif(not ops.is_compiled(), reason="the reference is its own judge")
def test_a_wrong_step_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = ops.hebbian_update_

    def wrong(weight: torch.Tensor, x: torch.Tensor, z: torch.Tensor, lr: Any, **options: Any) -> None:
        original(weight, x, z, 1.01 * lr, **options)

    file = tmp_path / "step.json"
    with monkeypatch.context() as patch:
        patch.setattr(ops, "hebbian_update_", wrong)
        assert step.main([*FEW, "--out", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"].values()
    assert row["status"] == "FAILED"
    assert "ms" not in row
    assert "FAILED, not timed: resnet18" in capsys.readouterr().out
    assert step.main([*FEW, "--out", str(file), "--resume", "--budget", "-1"]) == 3  # what failed is still to be done
    assert step.main([*FEW, "--out", str(file), "--resume"]) == 0
    (row,) = json.loads(file.read_text())["rows"].values()
    assert row["status"] == "ok"


def test_a_wrong_fold_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    start, x = _resnet()
    _, y = step_variants.example(step_variants.Setting("resnet18", 8, 2, 10), "nchw")
    monkeypatch.setattr(Fold, "_fold", _with_a_wrong_bias(Fold._fold))
    errors = step_variants.parity(start, trace_layers(start, x), x, y, 5)
    assert errors["frozen fold"] > step_variants.ALLOWED > errors["naive"]


def _with_a_wrong_bias(original: Any) -> Any:
    def fold(self: Fold, *sources: Any) -> None:
        original(self, *sources)
        self._folded[1].add_(1e-3)

    return fold


def test_multiply_adds_of_a_step() -> None:
    """Three layers of 1, 1 and 2 MACs, the first one frozen; no layer passes gradients to a picture or into the prefix."""
    nothing = torch.empty(0)
    dgrads = (("a", 1, False), ("b", 1, False), ("c", 2, True))
    calls = [step_variants.Call(name, None, nothing, nothing, macs, dgrad) for name, macs, dgrad in dgrads]
    counts = step_variants.mac_counts(calls, {"a"}, {"a": False, "b": True, "c": True})
    assert counts["sgd"] == 2 + 3 + 6
    assert counts["frozen"] == 1 + 2 + 6
    assert counts["local"] == counts["naive"] == 1 + 1 + 2 + 6
    assert counts["local/4"] == 9.25


def test_every_network_and_variant_takes_a_right_step() -> None:
    setting = step_variants.Setting("mobilenet_v2", 32, 2, 10)
    for layout in step_variants.LAYOUTS:
        x, y = step_variants.example(setting, layout)
        start = step_variants.network(setting, layout)
        errors = step_variants.parity(start, trace_layers(start, x), x, y, 20)
        assert set(errors) == {"naive", *step_variants.SAMPLES, "frozen fold"}
        assert max(errors.values()) < step_variants.ALLOWED


def test_verdicts() -> None:
    def row(local: float, quarter: float) -> dict[str, Any]:
        ms = {"frozen": 100.0, "local": local, "local/2": 120.0, "local/4": quarter, "local/8": 101.0}
        return {"ms": {name: {"step": value} for name, value in ms.items()}, "kernels_ms": {"local": 20.0}}

    assert step_tables.close_sample(row(104.0, 110.0)) == "local"
    assert step_tables.close_sample(row(125.0, 105.0)) == "local/4"
    assert step_tables.close_sample(row(125.0, 106.0)) == "local/8"
    assert step_tables.over_kernels(row(125.0, 106.0), "local") == (25.0, 20.0)
    paired = {**row(125.0, 106.0), "over_frozen_ms": [21.0, 90.0, 22.0]}
    assert step_tables.over_kernels(paired, "local") == (22.0, 20.0)


def test_the_interval_of_a_median() -> None:
    """Of 100 values the 40th to the 61st, of which the true median is between with 95 %; of few, all."""
    assert step_tables.median_interval([float(i) for i in reversed(range(1, 101))]) == (40.0, 61.0)
    assert step_tables.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_pairs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[str] = []

    class Fake:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def step(self, _x: torch.Tensor, _y: torch.Tensor) -> dict[str, float]:
            took.append(self.name)
            return {"step": self.seconds}

    monkeypatch.setattr(step, "LEAST_ROUNDS", 2)
    frozen: Any = Fake("frozen", 0.5)
    local: Any = Fake("local", 0.75)
    assert step.over_frozen_ms(frozen, local, torch.zeros(1), torch.zeros(1), 0) == [250.0, 250.0]
    assert took == ["local", "frozen", "frozen", "local"]


@pytest.mark.parametrize("wrong", [["--networks", "lenet"], ["--layouts", "nchw,nope"], ["--depths", "1.0"], ["--resume"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(wrong)
