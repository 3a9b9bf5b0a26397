"""benchmarks/scaling.py: a step's schedule by hand, bytes against the real network, tables."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ROOT, scaling
from benchmarks.scaling import Layer, Link, Machine, Step, methods, resnet50, step

# A multiply-add takes 2 s, a byte 1 s over a link of two processes (twice half of it), a message none.
SIMPLE = Machine(flops_per_s=1.0, intra=1.0, inter=0.5, latency_s=0.0, gpus_per_node=2)
LAYERS = [Layer(forward=1.0, weight=3, trained=3), Layer(forward=2.0, weight=4, trained=5)]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket for every tensor."""
    monkeypatch.setattr(scaling, "GRADIENT_BUCKET", 1)
    monkeypatch.setattr(scaling, "CORRELATION_BUCKET", 1)


def test_all_reduce() -> None:
    assert SIMPLE.all_reduce(6, 1) == 0
    assert SIMPLE.all_reduce(6, 2) == 6  # 2 * 1/2
    assert SIMPLE.all_reduce(6, 4) == 2 * 3 / 4 * 6 / 0.5  # between nodes
    assert Machine(1, 1, 1, 0.25, 8).all_reduce(0, 5) == 3 * 0.25


def test_a_link_sends_full_buckets_one_after_the_other() -> None:
    link = Link(SIMPLE, 2, bucket=4)
    link.add(3, now=0)
    assert link.free == 0  # not full
    link.add(2, now=1)
    assert link.free == 1 + 5
    link.add(4, now=2)
    assert link.free == 6 + 4  # waits for the one before
    link.send(now=100)
    assert (link.free, link.size) == (10, 9)  # nothing was left


@pytest.mark.usefixtures("small_buckets")
def test_steps_by_hand() -> None:
    # Forward 2 + 4, backward of the last layer 8, whose gradient goes from 14 to 19, of the first 2: at 16; then 3 more for it.
    assert step(LAYERS, 0, SIMPLE, 2, 1, local=False) == Step(seconds=22, waited=6, size=8)
    # Frozen: no gradient of the transition layer's input.
    assert step(LAYERS, 1, SIMPLE, 2, 1, local=False) == Step(seconds=15, waited=5, size=5)
    # Local: 2 for the update, its D from 4 to 7, beside the forward of the other layer.
    assert step(LAYERS, 1, SIMPLE, 2, 1, local=True) == Step(seconds=17, waited=5, size=8)
    assert step(LAYERS, 1, SIMPLE, 2, 1, local=True, sync=False) == Step(seconds=17, waited=5, size=5)
    assert step(LAYERS, 0, SIMPLE, 1, 3, local=False) == Step(seconds=3 * 16, waited=0, size=8)


def test_resnet50_is_the_real_one() -> None:
    from torchvision.models import resnet50 as build

    layers = resnet50()
    with torch.device("meta"):
        model = build()
    assert len(layers) == 54
    assert sum(layer.trained for layer in layers) == 4 * sum(p.numel() for p in model.parameters())
    assert sum(layer.forward for layer in layers) == pytest.approx(4.09e9, rel=0.01)  # torchvision's documentation: 4.09 GMAC
    assert all(0 < layer.weight <= layer.trained for layer in layers)


def test_a_run_is_the_mean_of_its_steps() -> None:
    layers = [Layer(1.0, 4, 4)] * 10
    found = methods(layers, SIMPLE, 2, 1, epochs=10)
    assert found["SGD"].size == 40
    # Boundaries 0, 0, 1, 2, ... 8 (floors of 0.9 times the epoch): their mean is 3.6.
    assert found["frozen"].size == pytest.approx(4 * (10 - 3.6))
    assert found["refresh 1/4"].size == pytest.approx(4 * (10 - 3.6 * 3 / 4))
    assert found["Hebbian"].size == 40
    assert found["Hebbian, sync=16"].size == pytest.approx(4 * (10 - 3.6 * 15 / 16))
    assert found["frozen"].seconds < found["refresh 1/4"].seconds < found["SGD"].seconds


def test_what_is_printed_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("**PREDICTION by arithmetic, nothing measured.**")
    assert "| 8 " in printed
    assert "1.00x" in printed


def test_the_committed_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    assert (ROOT / "benchmarks" / "results" / "scaling_resnet50_prediction.md").read_text() == capsys.readouterr().out


@pytest.mark.parametrize("options", [["--batch", "0"], ["--gpus", "0"], ["--inter", "-1"], ["--latency", "-1"]])
def test_wrong_arguments(options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scaling.main(options)
    assert ended.value.code == 2
