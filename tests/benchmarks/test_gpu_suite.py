"""The GPU suite's logic, without a GPU."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, LAYOUTS

from benchmarks import ROOT, gpu_graph, gpu_once, gpu_parity, gpu_suite, stages
from benchmarks.stages import Command
from localsgd_ext._precision import tf32_allowed

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def namespace(out: Path, **more: object) -> Namespace:
    return Namespace(out=out, budget=60.0, resume=False, device="cuda", kernels="", **more)


@no_gpu
def test_without_a_gpu_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu_suite: a GPU is needed")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert gpu_parity.main(["--out", str(tmp_path / "p.json")]) == 2
    assert gpu_graph.main(["--out", str(tmp_path / "g.json")]) == 2


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--stages", "build,fly"], "--stages must be of build, parity, pytest, sanitizer, graph, kernels, train, got fly"),
        (["--device", "cpu"], "--device cpu needs --stages parity"),
    ],
)
def test_wrong_arguments(argv: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), *argv])
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("stage", stages.STAGES)
def test_command_lines_are_well_formed(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files exist, and the scripts' own parsers take the options."""
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    commands = stages.STAGES[stage](namespace(tmp_path))
    assert commands
    for command in commands:
        assert all(isinstance(word, str) for word in command.argv)
        python = command.argv.index(sys.executable)
        script = command.argv[python + 1]
        assert script == "-m" or Path(ROOT, script).is_file()
        assert command.status(0, "1 calls" if stage == "sanitizer" else "") == "passed"
        assert command.status(None) == "stopped"
        assert command.status(77) == "failed"
    if stage == "kernels":
        from benchmarks import kernels

        parsed = kernels.arguments(commands[0].argv[2:])
        assert parsed.device == "cuda"
        assert parsed.out == tmp_path / "kernels_rows.json"
        assert parsed.budget == pytest.approx(54)


def test_the_train_stage_names_options_that_exist() -> None:
    from typer.testing import CliRunner

    from localsgd_ext.train.cli import app

    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert all(option in shown for option in (*stages.TRAIN[::2], "--device", "--resume"))


def test_sanitizer_stage_says_if_the_tool_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "find_sanitizer", lambda: None)
    monkeypatch.setattr(stages, "no_gpu", lambda: None)
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "sanitizer"]) == 0
    assert "unavailable" in capsys.readouterr().out
    assert "compute-sanitizer is neither" in json.loads((tmp_path / "sanitizer.json").read_text())["note"]


def test_sanitizer_findings_are_failures_and_refusals_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    command = stages.STAGES["sanitizer"](namespace(tmp_path))[0]
    for rc in (1, 2, 7, 9, 255, -9):
        assert command.status(rc) == "failed"
        assert command.status(rc, "ImportError: device not supported") == "failed"  # not the tool's own line
        assert command.status(rc, "$ it\n========= COMPUTE-SANITIZER\n========= Error: Device not supported\n") == "unavailable"
    assert command.status(0, "========= COMPUTE-SANITIZER\n96 calls\n========= ERROR SUMMARY: 0 errors\n") == "passed"
    assert command.status(0, "========= ERROR SUMMARY: 0 errors\n") == "failed"  # nothing ran
    assert command.status(0, "0 calls\n") == "failed"


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("exec python", "failed"),  # the script's import fails
        ("echo '========= Unable to find injection library libsanitizer-collection.so'; exit 1", "unavailable"),
        ("echo 48 calls; exit 9", "failed"),
        ("echo 48 calls", "passed"),
    ],
)
def test_the_sanitizer_stage_as_a_process(what: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, broken = tmp_path / "compute-sanitizer", tmp_path / "broken"
    shift = 'while [ $# -gt 0 ] && [ ! -x "$1" ]; do shift; done; '  # to the interpreter
    tool.write_text("#!/bin/sh\n" + shift + what.replace("exec python", 'exec "$@"') + "\n")
    tool.chmod(0o755)
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    monkeypatch.setattr(stages, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(stages, "no_gpu", lambda: None)
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--stages", "sanitizer"]) == (status == "failed")
    result = json.loads((out / "sanitizer.json").read_text())
    assert [command["status"] for command in result["commands"]] == [status] * 4
    if what == "exec python":
        assert {command["rc"] for command in result["commands"]} == {gpu_once.FAILED}
        assert "cannot open shared object file" in (out / "sanitizer.log").read_text()


def quick(name: str, code: str, **meanings: str) -> Command:
    return Command(name, [sys.executable, "-c", code], {"MARK": name}, {int(k[1:]): v for k, v in meanings.items()})


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stages that note in ``runs`` that they ran."""
    runs = tmp_path / "runs"
    note = f"import os, sys; open({str(runs)!r}, 'a').write(os.environ['MARK'] + '\\n'); "
    made = {
        "good": [quick("good", note + "print('hello')")],
        "bad": [quick("bad", note + "sys.exit(4)"), quick("after", note)],
        "slow": [quick("slow", note + "import time; time.sleep(60)")],
        "known": [quick("known", note + "sys.exit(5)", _5="unavailable")],
    }
    monkeypatch.setattr(stages, "STAGES", {name: lambda _args, commands=commands: commands for name, commands in made.items()})
    monkeypatch.setattr(stages, "no_gpu", lambda: None)
    return runs


def test_stages_leave_json_and_logs_and_resume(fake_stages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--budget", "5"]) == 1
    results = {stage: json.loads((out / f"{stage}.json").read_text()) for stage in stages.STAGES}
    assert {stage: result["status"] for stage, result in results.items()} == {
        "good": "passed", "bad": "failed", "slow": "stopped", "known": "unavailable",
    }  # fmt: skip
    assert "hello" in (out / "good.log").read_text()
    assert results["good"]["tail"][-1] == "hello"
    assert [command["rc"] for command in results["bad"]["commands"]] == [4, 0]
    assert results["slow"]["seconds"] == pytest.approx(5, abs=4)
    assert results["bad"]["note"] == "bad: failed, rc 4"
    ran = fake_stages.read_text().split()
    assert ran == ["good", "bad", "after", "slow", "known"]
    assert gpu_suite.main(["--out", str(out), "--budget", "5", "--resume"]) == 1
    assert fake_stages.read_text().split()[len(ran) :] == ["bad", "after", "slow"]
    assert "(from before)" in capsys.readouterr().out
    assert gpu_suite.main(["--out", str(out), "--stages", "good"]) == 0
    assert fake_stages.read_text().split()[-1] == "good"


def test_parity_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    argv = ["--device", "cpu", "--out", str(file), "--cases", "^(linear|depthwise3x3)$"]
    assert gpu_parity.main([*argv, "--budget", "0"]) == 3
    assert "0 of 42 done" in capsys.readouterr().err
    assert gpu_parity.main(argv) == 2
    assert gpu_parity.main([*argv, "--resume"]) == 0
    assert "42 of 42 agree with fp64" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert rows["linear|fp32|sliced"]["parity"].keys() == {"gram", "direct", "library", "update"}
    assert rows["depthwise3x3|bf16|contiguous"]["parity"].keys() == {"depthwise", "direct", "library", "update"}


def test_parity_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, asked = tmp_path / "rows.json", list[str]()
    argv = ["--device", "cpu", "--out", str(file), "--cases", "^linear$"]

    def row(_case: object, dtype: str, layout: str, _device: str) -> dict[str, str]:
        asked.append(f"{dtype}|{layout}")
        states = {"bf16|sliced": "FAILED", "fp16|sliced": "ERROR"}
        return {"status": states.get(asked[-1], "ok") if len(asked) <= 21 else "ok"}

    monkeypatch.setattr(gpu_parity, "row", row)
    assert gpu_parity.main(argv) == 1
    assert len(asked) == 21
    assert gpu_parity.main([*argv, "--resume"]) == 0
    assert asked[21:] == ["bf16|sliced", "fp16|sliced"]


def test_a_disagreement_fails_the_parity_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu_parity.Judge.judge

    def off(self: object, d: torch.Tensor, algorithm: str, *, direction: bool = False) -> object:
        return real(self, d * 1.001 if algorithm == "direct" else d, algorithm, direction=direction)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_parity.Judge, "judge", off)
    file = tmp_path / "rows.json"
    assert gpu_parity.main(["--device", "cpu", "--out", str(file), "--cases", "^linear$"]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert rows["linear|fp32|contiguous"]["failed"] == ["direct"]


def test_the_parity_stage_as_a_process(tmp_path: Path) -> None:
    """From another directory, as on a bare machine; stopped by its budget and said so."""
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--device", "cpu", "--stages", "parity", "--budget", "9"]) in (0, 1)
    result = json.loads((out / "parity.json").read_text())
    assert result["status"] in ("stopped", "passed")
    assert set(result["details"].get("rows", {"ok": 0})) <= {"ok"}


def test_parity_covers_every_case() -> None:
    assert len(list(gpu_parity.todo())) == len(CASES) * len(LAYOUTS) * len(gpu_parity.DTYPES)


def test_the_sanitizers_script_runs_every_algorithm_of_ours() -> None:
    algorithms = {algorithm for case in gpu_graph.chosen() for algorithm in case.algorithms}
    assert algorithms == {"gram", "direct", "depthwise", "library"}
    assert gpu_once.run("cpu", ("fp32",)) > 0


def test_the_sanitizers_script_runs_every_dtype_with_tf32_set_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def update(_weight: torch.Tensor, x: torch.Tensor, *_: object, **__: object) -> None:
        seen.add((x.dtype, tf32_allowed(linear=True), tf32_allowed(linear=False)))

    monkeypatch.setattr("localsgd_ext.hebbian_update_", update)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    gpu_once.run("cpu")
    allowed = {(torch.float32, True, True)}
    assert seen == allowed | {(dtype, False, False) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def test_the_graph_scripts_step_on_a_cpu() -> None:
    for case in gpu_graph.chosen():
        weight, lr, skipped, step = gpu_graph.stepper(case, "auto", torch.float32, "cpu")
        before = weight.clone()
        lr.fill_(0.01)
        step()
        assert not torch.equal(weight, before)
        assert skipped.item() == 0


@pytest.mark.parametrize("faithful", [True, False])
def test_a_graph_that_loses_an_update_is_noticed(faithful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stage's comparison, with a fake that replays calls."""
    real, calls, capturing = gpu_graph.hebbian_update_, [], [False]

    def update(*args: object, **kwargs: object) -> None:
        if capturing[0]:
            calls.append(lambda: real(*args, **kwargs))  # type: ignore[arg-type]
        else:
            real(*args, **kwargs)  # type: ignore[arg-type]

    @contextmanager
    def capture(_graph: object) -> Iterator[None]:
        capturing[0] = True
        yield
        capturing[0] = False
        if not faithful:
            calls.pop()

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: [call() for call in calls]),
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    stepper = gpu_graph.stepper
    monkeypatch.setattr(gpu_graph, "stepper", lambda case, algorithm, dtype, _device: stepper(case, algorithm, dtype, "cpu"))
    monkeypatch.setattr(gpu_graph, "hebbian_update_", update)
    case = next(case for case in CASES if case.name == "linear")
    assert gpu_graph.graph_equals_eager(case, "auto", torch.float32, updates=7) == faithful
    assert len(calls) == (7 if faithful else 6)
