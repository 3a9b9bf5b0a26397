"""The scripts that the GPU suite runs, as far as they go without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, LAYOUTS, with_layout

from benchmarks import gpu_graph, gpu_once, gpu_parity, gpu_suite
from localsgd_ext._precision import tf32_allowed
from localsgd_ext.train.files import read_json

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


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


def test_parity_in_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    argv = ["--device", "cpu", "--out", str(file), "--cases", "^linear$"]
    assert gpu_parity.main([*argv, "--jobs", "2"]) == 0
    together = json.loads(file.read_text())["rows"]
    file.unlink()
    assert gpu_parity.main(argv) == 0
    assert json.loads(file.read_text())["rows"] == together
    with pytest.raises(SystemExit):
        gpu_parity.main([*argv, "--jobs", "0"])
    assert "--jobs must be positive, got 0" in capsys.readouterr().err


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
    """From another directory, as on a bare machine; stopped by its budget and said so, or done."""
    out = tmp_path / "out"
    status = gpu_suite.main(["--out", str(out), "--device", "cpu", "--stages", "parity", "--budget", "29"])
    result = read_json(out / gpu_suite.SUMMARY)["stages"]["parity"]
    assert (status, result["status"]) in ((3, "stopped"), (0, "passed"))
    assert set(result["details"]["rows"]) == {"ok"}


def test_parity_covers_every_case() -> None:
    assert len(list(gpu_parity.todo())) == len(CASES) * len(LAYOUTS) * len(gpu_parity.DTYPES)


def test_the_sanitizers_script_runs_every_algorithm_of_ours() -> None:
    algorithms = {algorithm for case in gpu_graph.chosen() for algorithm in case.algorithms}
    assert algorithms == {"gram", "direct", "depthwise", "library"}
    assert gpu_once.run("cpu", ("fp32",)) > 0


def test_the_sanitizers_script_makes_its_operands_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and strides as the layouts have them."""
    seen = []
    monkeypatch.setattr("localsgd_ext.hebbian_update_", lambda _weight, x, z, *_, **__: seen.append((x, z)))
    gpu_once.run("cpu", ("bf16",))
    case = gpu_graph.chosen()[0]
    sliced = next((x, z) for x, z in seen if x.shape == case.x and x.stride(-1) == 2)
    x, weight, bias = case.sample(torch.float32, "cpu")
    z = with_layout(case.forward(x, weight, bias).bfloat16(), "sliced", case)
    assert torch.equal(sliced[0], x.bfloat16())
    assert torch.equal(sliced[1], z)
    assert sliced[1].stride() == z.stride()


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
