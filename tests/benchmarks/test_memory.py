"""benchmarks/memory.py: rows are measured in processes of their own; tables, verdict and picture come from the file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory

FEW = ["--networks", "resnet18", "--batch", "2", "--image", "16", "--positions", "0,0.5"]


def fake(task: dict[str, Any]) -> dict[str, Any]:
    saved = int((1 - task["position"]) * 1000 * memory.MIB)
    boundary = int(54 * task["position"])
    return {**task, "boundary": boundary, "layers": 54, "saved_bytes": saved, "peak_rss_bytes": 8 * saved, "status": "ok"}


def test_a_row_is_measured_in_a_fresh_process() -> None:
    tasks = memory.work(memory.arguments(FEW))
    sgd, local = (memory.in_fresh_process(tasks[f"resnet18|nchw|{where}"]) for where in ("0.0|sgd", "0.5|local"))
    assert sgd["status"] == local["status"] == "ok", (sgd, local)
    assert (sgd["boundary"], local["boundary"], local["layers"]) == (0, 10, 21)
    assert 0 < local["saved_bytes"] < sgd["saved_bytes"]
    assert sgd["saved_bytes"] < sgd["peak_rss_bytes"]  # gradients and momentum as well


def test_a_run_prints_what_its_file_holds_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "in_fresh_process", fake)
    file, drawn = tmp_path / "memory.json", tmp_path / "memory.png"
    few = ["--networks", f"resnet18,{memory.PAPER}", "--positions", "0,0.5"]
    assert memory.main([*few, "--out", str(file), "--budget", "-1"]) == 3
    assert memory.main([*few, "--out", str(file)]) == 2
    capsys.readouterr()
    assert memory.main([*few, "--out", str(file), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert memory.main(["--table", str(file), "--picture", str(drawn)]) == 0
    assert capsys.readouterr().out == printed
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())["rows"]) == 4 + 3
    assert (
        "a step of SGD peaks at 8.39 GB. With 12 of 54 layers local (equation 2 allows 12 by then) at 6.52 GB, 78 %" in printed
    )
    assert "of it (half: not met); with 27, the most measured, at 4.19 GB, 50 % of it (half: met)" in printed
    assert "The first position measured at which half is met: 27." in printed


def test_a_process_that_fails_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "in_fresh_process", lambda task: {**task, "status": "ERROR", "why": "out of memory"})
    assert memory.main([*FEW, "--out", str(tmp_path / "memory.json")]) == 1
    assert "ERROR: resnet18, sgd: out of memory" in capsys.readouterr().out


def test_what_really_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process with an exception, and one that would take too long."""
    task = memory.work(memory.arguments(FEW))["resnet18|nchw|0.0|sgd"]
    failed = memory.in_fresh_process({**task, "layout": "sideways"})
    assert (failed["status"], failed["why"]) == ("ERROR", "KeyError: 'sideways'")
    monkeypatch.setattr(memory, "TIME_LIMIT", 0.01)
    file = tmp_path / "memory.json"
    assert memory.main([*FEW, "--positions", "0", "--out", str(file)]) == 1
    assert "ERROR: resnet18, sgd: it took more than 0.01 s" in capsys.readouterr().out
    assert memory.main(["--table", str(file)]) == 1


def test_the_position_of_the_papers_epoch_is_measured() -> None:
    assert int(memory.PAPER_POSITION * 54) == memory.fastest_boundary(54)


def test_only_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fails_once(task: dict[str, Any]) -> dict[str, Any]:
        tried.append(task["method"])
        return {**task, "status": "ERROR", "why": "no"} if tried == ["sgd", "local"] else fake(task)

    monkeypatch.setattr(memory, "in_fresh_process", fails_once)
    out = ["--out", str(tmp_path / "memory.json")]
    assert memory.main([*FEW, *out]) == 1
    assert tried == ["sgd", "local", "naive", "frozen"]
    assert memory.main([*FEW, *out, "--resume", "--budget", "-1"]) == 3  # what failed is still to be done
    assert memory.main([*FEW, *out, "--resume"]) == 0
    assert tried[4:] == ["local"]


@pytest.mark.parametrize("wrong", [["--networks", "lenet"], ["--layouts", "nope"], ["--positions", "1.0"], ["--resume"]])
def test_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        memory.main(wrong)
