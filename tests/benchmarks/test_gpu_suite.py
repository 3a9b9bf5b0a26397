"""The GPU suite's logic, without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT, gpu, gpu_graph, gpu_once, gpu_parity, gpu_suite, kernels, stages
from benchmarks.stages import Command, Request
from localsgd_ext.train import environment

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / gpu_suite.SUMMARY).read_text())  # type: ignore[no-any-return]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with our kernels, as far as the suite's own process looks."""
    describe = environment.describe
    monkeypatch.setattr(gpu, "no_gpu", lambda: "")
    monkeypatch.setattr(stages, "missing_on_gpu", lambda: "")
    monkeypatch.setattr(gpu_suite.environment, "describe", lambda _device: {**describe("cpu"), "gpu": "NVIDIA H200"})


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
        (
            ["--stages", "build,fly"],
            "--stages must be of build, parity, pytest, graph, kernels, sanitizer, step, train, compiled, got fly",
        ),
        (["--device", "cpu"], "--device cpu needs --stages parity"),
        (["--stages", "build,parity", "--", "--networks", "resnet50"], "for the stages kernels and compiled, got --stages build,parity"),
        (["--", "--networks", "alexnet"], "--networks must be of"),
        (["--kernels", "--no-compile"], "unrecognized arguments: --kernels --no-compile"),
    ],
)  # fmt: skip
def test_wrong_arguments(argv: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_suite.main(["--out", str(tmp_path), *argv])
    assert end.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("stage", stages.STAGES)
def test_command_lines_are_well_formed(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files exist, and the scripts' own parsers take the options."""
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    commands = stages.STAGES[stage](Request(tmp_path, 80.0, more=("--seconds", "0.2")))
    assert commands
    said = {"sanitizer": "1 calls", "pytest": "12 passed, 3 skipped in 4.56s"}.get(stage, "")
    for command in commands:
        assert all(isinstance(word, str) for word in command.argv)
        python = command.argv.index(sys.executable)
        script = command.argv[python + 1]
        assert script == "-m" or Path(ROOT, script).is_file()
        assert command.status(0, said) == "passed"
        assert command.status(None) == "stopped"
        assert command.status(77) == "failed"
    if stage in stages.TIMED:
        parsed = kernels.arguments(commands[0].argv[2:])
        assert parsed.device == "cuda"
        assert parsed.out == tmp_path / f"{stage}_rows.json"
        assert parsed.budget == 60
        assert parsed.seconds == 0.2
        assert parsed.no_compile == (stage == "kernels")
        assert not parsed.resume
        (tmp_path / f"{stage}_rows.json").touch()
        assert kernels.arguments(stages.STAGES[stage](Request(tmp_path, 80.0))[0].argv[2:]).resume


def test_kernels_with_targets_are_timed_first(tmp_path: Path) -> None:
    command = stages.STAGES["kernels"](Request(tmp_path, 80.0, more=("--networks", "resnet18-cifar", "--batch", "1")))[0]
    _, todo = kernels.work(kernels.arguments(command.argv[2:]))
    order = list(dict.fromkeys((dtype, layout) for _, dtype, layout in todo.values()))
    assert order[:4] == [("bf16", "nhwc"), ("fp32", "nhwc"), ("tf32", "nhwc"), ("bf16", "nchw")]


def test_every_test_of_tests_gpu_is_run_but_what_parity_does(tmp_path: Path) -> None:
    commands = stages.STAGES["pytest"](Request(tmp_path, 80.0))
    files = [command.argv[-1] for command in commands]
    assert files == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    left_out = next(word for word in commands[0].argv if word.startswith("--deselect=")).removeprefix("--deselect=")
    file, _, test = left_out.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text()
    assert commands[0].status(0, "54 skipped in 1.23s") == "failed"  # nothing was tested


def test_the_callers_python_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/their/own")
    assert stages.python_path() == {"PYTHONPATH": f"{ROOT}{os.pathsep}/their/own"}
    monkeypatch.delenv("PYTHONPATH")
    assert stages.python_path() == {"PYTHONPATH": str(ROOT)}


def test_the_train_stage_names_options_that_exist() -> None:
    from typer.testing import CliRunner

    from localsgd_ext.train.cli import app

    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert all(option in shown for option in (*stages.TRAIN[::2], "--device", "--resume"))


# ---- the sanitizer -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretended_gpu")
def test_a_tool_that_is_absent_is_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "find_sanitizer", lambda: None)
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "sanitizer"]) == 4
    assert "not passed: sanitizer (unavailable)" in capsys.readouterr().out
    assert summary(tmp_path)["not_passed"]["sanitizer"].startswith("unavailable: compute-sanitizer is neither")


def test_setuptools_that_cannot_read_pyproject_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert f"setuptools>={stages.LEAST_SETUPTOOLS}" in required
    monkeypatch.setattr(stages.metadata, "version", lambda _: "65.5.0")
    with pytest.raises(stages.Unavailable, match=r"setuptools is 65.5.0, pyproject.toml needs 77"):
        stages.build(Request(tmp_path, 1.0))


def test_sanitizer_findings_are_failures_and_refusals_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    command = stages.STAGES["sanitizer"](Request(tmp_path, 60.0))[0]
    for rc in (1, 2, 7, 9, 255, -9):
        assert command.status(rc) == "failed"
        assert command.status(rc, "ImportError: device not supported") == "failed"  # not the tool's own line
        refused = "$ it\n========= COMPUTE-SANITIZER\n========= Error: Device not supported here\n"
        assert command.status(rc, refused) == "unavailable"
        assert command.refusal(refused) == "Error: Device not supported here"
    assert command.status(0, "========= COMPUTE-SANITIZER\n96 calls\n========= ERROR SUMMARY: 0 errors\n") == "passed"
    assert command.status(0, "========= ERROR SUMMARY: 0 errors\n") == "failed"  # nothing ran
    assert command.status(0, "0 calls\n") == "failed"


def test_only_our_kernels_are_sanitized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a word that the mangled names of all of them hold."""
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    commands = {command.name: command for command in stages.STAGES["sanitizer"](Request(tmp_path, 60.0))}
    for kind in ("memcheck", "synccheck", "racecheck"):
        argv = commands[kind].argv
        assert argv[argv.index("--kernel-name") + 1] == "kns=localsgd"
    for path in (ROOT / "csrc" / "kernels").glob("*.cu*"):
        before, found, _ = path.read_text().partition("__global__")
        assert not found or "namespace localsgd::cuda {" in before, path.name


def test_what_initcheck_finds_in_others_kernels_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "find_sanitizer", lambda: "/usr/bin/compute-sanitizer")
    commands = {command.name: command for command in stages.STAGES["sanitizer"](Request(tmp_path, 60.0))}
    assert "--kernel-name" not in commands["initcheck"].argv
    found = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at {} in x.cuh:20\n24 calls\n"
    ours = found.format("void localsgd::cuda::gram_kernel<(localsgd::cuda::Core)1>(localsgd::cuda::GramParams)+0x150")
    theirs = found.format("void at::native::elementwise_kernel<128, 2>(int)+0x20")
    theirs += "=========     Host Frame: localsgd::cuda::Device::scratch in _C.so\n"
    assert commands["initcheck"].status(9, ours) == "failed"
    assert commands["initcheck"].status(9, theirs) == "passed"
    assert commands["initcheck"].status(9, theirs.replace("24 calls", "")) == "failed"
    assert commands["memcheck"].status(9, theirs) == "failed"


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("exec python", "failed"),  # the script's import fails
        ("echo '========= Unable to find injection library libsanitizer-collection.so'; exit 1", "unavailable"),
        ("echo '=========     at localsgd::cuda::k()+0x1'; echo 48 calls; exit 9", "failed"),
        ("echo 48 calls", "passed"),
    ],
)
@pytest.mark.usefixtures("pretended_gpu")
def test_the_sanitizer_stage_as_a_process(what: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, broken = tmp_path / "compute-sanitizer", tmp_path / "broken"
    shift = 'while [ $# -gt 0 ] && [ ! -x "$1" ]; do shift; done; '  # to the interpreter
    tool.write_text("#!/bin/sh\n" + shift + what.replace("exec python", 'exec "$@"') + "\n")
    tool.chmod(0o755)
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    monkeypatch.setattr(stages, "find_sanitizer", lambda: str(tool))
    out = tmp_path / "out"
    expected = {"failed": 1, "unavailable": 4, "passed": 0}[status]
    assert gpu_suite.main(["--out", str(out), "--stages", "sanitizer"]) == expected
    result = summary(out)["stages"]["sanitizer"]
    assert [command["status"] for command in result["commands"]] == [status] * 4
    if what == "exec python":
        assert {command["rc"] for command in result["commands"]} == {gpu_once.FAILED}
        assert "cannot open shared object file" in (out / gpu_suite.LOG).read_text()
    if status == "unavailable":
        assert "memcheck unavailable: Unable to find injection library" in result["note"]


# ---- stages, budget, summary -------------------------------------------------------------------------------------------


def quick(name: str, code: str, **meanings: str) -> Command:
    return Command(name, [sys.executable, "-c", code], {"MARK": name}, {int(k[1:]): v for k, v in meanings.items()})


@pytest.fixture
def fake_stages(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Stages that note that they ran; returns those that did since it was last asked."""
    runs = tmp_path / "runs"
    runs.touch()
    note = f"import os, sys; open({str(runs)!r}, 'a').write(os.environ['MARK'] + '\\n'); "
    made = {
        "good": [quick("good", note + "print('hello')")],
        "bad": [quick("after", note), quick("bad", note + "print('see'); sys.exit(4)")],
        "known": [quick("known", note + "sys.exit(5)", _5="unavailable")],
        "slow": [quick("slow", note + "import time; time.sleep(60)")],
        "late": [quick("late", note)],
    }
    monkeypatch.setattr(
        stages, "STAGES", {name: lambda _request, commands=commands: commands for name, commands in made.items()}
    )
    monkeypatch.setattr(gpu_suite, "LEAST", 0.1)
    seen = [0]

    def ran() -> list[str]:
        names = runs.read_text().split()
        before, seen[0] = seen[0], len(names)
        return names[before:]

    return ran


def test_one_summary_one_log_and_a_resume(
    fake_stages: Callable[[], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    start = time.monotonic()
    assert gpu_suite.main(["--out", str(out), "--budget", "12"]) == 1
    assert time.monotonic() - start == pytest.approx(12, abs=6)  # all of it, not each
    told = summary(out)
    assert {stage: result["status"] for stage, result in told["stages"].items()} == {
        "good": "passed", "bad": "failed", "known": "unavailable", "slow": "stopped", "late": "stopped",
    }  # fmt: skip
    assert told["stages"]["bad"]["note"] == "bad failed: exit status 4"
    assert told["stages"]["late"]["note"] == "not begun: the time is up"
    assert told["not_passed"].keys() == {"bad", "known", "slow", "late"}
    assert told["environment"]["gpu"] == "NVIDIA H200"
    assert [command["rc"] for command in told["stages"]["bad"]["commands"]] == [0, 4]
    assert told["stages"]["bad"]["commands"][1]["end"] == ["see"]
    assert "hello" in (out / gpu_suite.LOG).read_text()
    assert {path.name for path in out.iterdir()} == {gpu_suite.SUMMARY, gpu_suite.LOG}
    assert fake_stages() == ["good", "after", "bad", "known", "slow"]
    assert gpu_suite.main(["--out", str(out), "--budget", "5", "--stages", "good,bad,known", "--resume"]) == 1
    assert fake_stages() == ["bad", "known"]  # only the command that failed
    assert "passed before" in capsys.readouterr().out
    assert summary(out)["stages"].keys() == {"good", "bad", "known", "slow", "late"}
    assert gpu_suite.main(["--out", str(out), "--stages", "known", "--resume"]) == 4
    assert gpu_suite.main(["--out", str(out), "--stages", "slow", "--resume", "--budget", "6"]) == 3
    assert fake_stages() == ["known", "slow"]
    assert gpu_suite.main(["--out", str(out), "--stages", "late,good"]) == 0
    assert fake_stages() == ["good", "late"]  # in the suite's order, and good once more
    assert summary(out)["stages"].keys() == {"good", "late"}
    assert summary(out)["never_begun"] == ["bad", "known", "slow"]


def test_what_has_passed_survives_a_resume_that_cannot_begin(
    fake_stages: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh machine without its build, or with no time left; neither is what was asked for a success."""
    argv = ["--out", str(tmp_path / "out"), "--stages", "bad", "--resume"]
    assert gpu_suite.main(argv) == 1
    with monkeypatch.context() as without:
        without.setattr(stages, "missing_on_gpu", lambda: "no kernels of localsgd_ext")
        assert gpu_suite.main(argv) == 1
    assert [command["name"] for command in summary(tmp_path / "out")["stages"]["bad"]["commands"]] == ["after"]
    fake_stages()
    assert gpu_suite.main(argv) == 1
    assert fake_stages() == ["bad"]
    monkeypatch.setattr(stages, "TIMED", ("good",))
    good = ["--out", str(tmp_path / "out"), "--stages", "good"]
    assert gpu_suite.main([*good, "--resume"]) == 0
    assert gpu_suite.main([*good, "--resume", "--budget", "0", "--", "--networks", "vgg13-cifar"]) == 3


def test_results_of_another_machine_are_not_mixed(
    fake_stages: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert gpu_suite.main(["--out", str(out), "--stages", "good"]) == 0
    describe = gpu_suite.environment.describe
    monkeypatch.setattr(gpu_suite.environment, "describe", lambda device: {**describe(device), "gpu": "NVIDIA H100"})
    assert gpu_suite.main(["--out", str(out), "--stages", "good", "--resume"]) == 2
    assert "summary.json is of gpu 'NVIDIA H200', this is 'NVIDIA H100'" in capsys.readouterr().err
    assert gpu_suite.main(["--out", str(out), "--stages", "good"]) == 0


def test_nothing_of_an_older_run_is_told(fake_stages: Callable[[], list[str]], tmp_path: Path) -> None:
    """Rows without a summary, and those of a run that is begun again."""
    out = tmp_path / "out"
    out.mkdir()
    rows = stages.rows_file(out, "bad")
    for resume in ([], ["--resume"]):
        rows.write_text(json.dumps({"rows": {"a": {"status": "ok"}}}))
        (out / gpu_suite.SUMMARY).unlink(missing_ok=True)
        assert gpu_suite.main(["--out", str(out), "--stages", "bad", *resume]) == 1
        assert summary(out)["stages"]["bad"]["details"] == {}
    rows.write_text(json.dumps({"rows": {"a": {"status": "ok"}, "b": {"status": "FAILED", "failed": ["gram"]}}}))
    assert gpu_suite.main(["--out", str(out), "--stages", "bad", "--resume"]) == 1  # its own
    assert summary(out)["stages"]["bad"]["details"] == {"rows": {"ok": 1, "FAILED": 1}, "bad": {"b": ["gram"]}}


def test_what_a_killed_suite_leaves(tmp_path: Path) -> None:
    """The stage that ran is not told as passed, and its processes are gone."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu_suite.py"),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--stages",
        "parity",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as suite:
        while not (out / "parity_rows.json").exists():
            assert suite.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children").read_text().split()
        suite.send_signal(signal.SIGTERM)
        assert suite.wait(20) == 1
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert summary(out)["not_passed"] == {"parity": "stopped: the suite ended before this stage did"}


def builder(code: str) -> dict[str, Any]:
    return {"build": lambda _request: [quick("build_ext", code)], "parity": lambda _request: [quick("parity", "print('ran')")]}


def test_after_a_build_that_failed_nothing_runs(pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "STAGES", builder("raise SystemExit('nvcc is missing')"))
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1
    told = summary(tmp_path)["stages"]
    assert told["build"]["commands"][0]["end"] == ["nvcc is missing"]
    assert (told["parity"]["status"], told["parity"]["note"]) == ("stopped", "not begun: the build did not pass")


def test_without_our_kernels_every_stage_fails(pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parity stage would compare the reference with itself."""
    monkeypatch.setattr(stages, "STAGES", builder("pass"))
    monkeypatch.setattr(
        stages, "missing_on_gpu", lambda: "no kernels of localsgd_ext run on this GPU: it is of architecture sm_90"
    )
    assert gpu_suite.main(["--out", str(tmp_path), "--stages", "parity"]) == 1
    note = summary(tmp_path)["stages"]["parity"]["note"]
    assert note == "no kernels of localsgd_ext run on this GPU: it is of architecture sm_90 (stage build makes them)"
    assert "ran" not in (tmp_path / gpu_suite.LOG).read_text() if (tmp_path / gpu_suite.LOG).exists() else True
    assert gpu_suite.main(["--out", str(tmp_path)]) == 1  # a build that leaves none has failed
    assert summary(tmp_path)["stages"]["build"]["status"] == "failed"
    assert summary(tmp_path)["stages"]["parity"]["status"] == "stopped"


def test_a_fresh_machine_builds_again(pretended_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tmp_path / "built"
    out = tmp_path / "out"
    monkeypatch.setattr(stages, "STAGES", builder(f"open({str(built)!r}, 'w')"))
    monkeypatch.setattr(stages, "missing_on_gpu", lambda: "" if built.exists() else "nothing is compiled")
    assert gpu_suite.main(["--out", str(out)]) == 0
    written = built.stat().st_mtime_ns
    assert gpu_suite.main(["--out", str(out), "--resume"]) == 0
    assert built.stat().st_mtime_ns == written
    built.unlink()
    assert gpu_suite.main(["--out", str(out), "--resume"]) == 0
    assert built.exists()


@no_gpu
def test_what_is_missing_is_asked_of_a_process() -> None:
    assert re.match("a GPU is needed, ", stages.missing_on_gpu())


def test_verdicts_by_dtype_and_layout_are_in_the_summary(tmp_path: Path) -> None:
    def timed(dtype: str, layout: str, auto: float) -> dict[str, Any]:
        us = {"auto": auto, "wgrad": 30.0, "user": 40.0}
        case = {"weight": [64, 16, 1, 1], "groups": 1}
        return {"status": "ok", "kind": "expanding", "dtype": dtype, "layout": layout, "case": case, "us": us, "pick": "gram",
                "roofline_us": {"gram": 5.0}}  # fmt: skip

    rows = {"a": timed("bf16", "nhwc", 6.0), "b": timed("bf16", "nchw", 60.0), "c": {"status": "ERROR", "why": "too large"}}
    stages.rows_file(tmp_path, "kernels").write_text(json.dumps({"rows": rows}))
    told = stages.details("kernels", tmp_path)
    assert told["rows"] == {"ok": 2, "ERROR": 1}
    assert told["bad"] == {"c": "too large"}
    met = {name: verdicts[0]["met"] for name, verdicts in told["targets"].items()}
    assert met == {"bf16, nhwc": True, "bf16, nchw": False}
