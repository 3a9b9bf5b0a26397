"""The benchmark's own logic: parity gates timing, runs resume, tables come from the file, predictions say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case
from oracle import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernels, tables, targets
from benchmarks.baselines import functions, operands, reduced
from benchmarks.networks import layers
from benchmarks.parity import FLOORS, Judge
from benchmarks.timing import Timing
from localsgd_ext import ops

RESULTS = Path(kernels.__file__).parent / "results"
FEW = ["--device", "cpu", "--networks", "resnet18-cifar", "--batch", "1", "--layers", "512->10|1x1", "--layouts", "nhwc"]


class FakeTimer:
    device = kernels.roofline.device("T4")

    def measure(self, timed: dict[str, Any], _seconds: float) -> dict[str, Timing]:
        return {name: Timing(10.0 * (i + 1), 10.0, 5, "clock") for i, name in enumerate(timed)}


@pytest.fixture(autouse=True)
def _fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "timer_for", lambda _device, _processor_time: FakeTimer())


def run(*argv: str) -> int:
    return kernels.main([*FEW, "--no-compile", *argv])


def test_a_run_prints_what_its_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "kernels.json"
    assert run("--out", str(file)) == 0
    printed = capsys.readouterr().out
    assert kernels.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == printed
    content = json.loads(file.read_text())
    assert len(content["rows"]) == 4
    for row in content["rows"].values():
        assert row["status"] == "ok"
        assert row["us"]["auto"] == 10
        assert row["parity"]["auto"]["error"] <= row["parity"]["auto"]["allowed"]
    assert content["environment"]["torch"] == torch.__version__
    assert "PREDICTION" not in printed
    assert torch.__version__ in printed
    assert "| resnet18-cifar b1 |    4/4 |" in printed
    assert "fp32, nhwc: targets" in printed


@pytest.mark.skipif(not ops.is_compiled(), reason="the reference is its own judge")
def test_a_wrong_update_gets_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernels.Judge.judge

    def slightly_off(self: Judge, d: torch.Tensor, algorithm: str, *, direction: bool = False) -> Any:
        d = d.clone()
        d.view(-1)[0] *= 1.001 if algorithm == "direct" else 1
        return real(self, d, algorithm, direction=direction)

    monkeypatch.setattr(kernels.Judge, "judge", slightly_off)
    file = tmp_path / "kernels.json"
    assert run("--out", str(file)) == 1
    assert "FAILED" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"].values()
    assert {row["status"] for row in rows} == {"FAILED"}
    assert all("us" not in row for row in rows)


def test_a_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    assert run("--out", str(file), "--budget", "0") == 3
    assert "0 of 4 done: go on with --resume" in capsys.readouterr().err
    assert run("--out", str(file)) == 2
    assert "exists: --resume goes on with it" in capsys.readouterr().err
    assert run("--out", str(file), "--resume") == 0
    content = json.loads(file.read_text())
    first = next(iter(content["rows"]))
    content["rows"][first]["us"]["auto"] = 123.0  # stays if it is not measured again
    del content["rows"][list(content["rows"])[-1]]
    file.write_text(json.dumps(content))
    assert run("--out", str(file), "--resume") == 0
    again = json.loads(file.read_text())["rows"]
    assert len(again) == 4
    assert again[first]["us"]["auto"] == 123.0


def test_a_run_on_something_else_does_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    assert run("--out", str(file), "--budget", "0") == 3
    content = json.loads(file.read_text())
    content["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(content))
    assert run("--out", str(file), "--resume") == 2
    assert "was measured with torch '1.0'" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "now"), [([], ["--cpu-time"]), (["--cpu-time"], [])], ids=str)
def test_times_by_two_clocks_are_not_mixed(
    before: list[str], now: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)
    file, threads = tmp_path / "kernels.json", ["--threads", "1"]
    assert run("--out", str(file), "--budget", "0", *threads, *before) == 3
    assert run("--out", str(file), "--resume", *threads, *now) == 2
    clocks = ["processor time" if flags else "wall clock" for flags in (before, now)]
    assert "was measured with clock {!r}, this is {!r}".format(*clocks) in capsys.readouterr().err
    assert run("--out", str(file), "--resume", *threads, *before) == 0


def test_an_error_of_one_layer_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(case: Case, *_args: Any) -> Any:
        if case.dims == 0:
            raise torch.OutOfMemoryError("too large\nand a trace")
        return operands(case, *_args)

    monkeypatch.setattr(kernels, "operands", out_of_memory)
    file = tmp_path / "kernels.json"
    assert run("--out", str(file)) == 1
    rows = json.loads(file.read_text())["rows"].values()
    assert sorted(row["status"] for row in rows) == ["ERROR", "ok", "ok", "ok"]
    assert [row["why"] for row in rows if row["status"] == "ERROR"] == ["too large"]
    asked: list[str] = []
    monkeypatch.setattr(kernels, "operands", lambda case, *args: (asked.append(case.name), operands(case, *args))[1])
    assert run("--out", str(file), "--resume", "--budget", "0") == 3  # what failed is still to be done
    assert run("--out", str(file), "--resume") == 0
    assert len(set(asked)) == 1
    assert asked[0].startswith("linear 512->10")
    assert {row["status"] for row in json.loads(file.read_text())["rows"].values()} == {"ok"}


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--dtypes", "int8"], "--dtypes must be of"),
        (["--networks", "alexnet"], "--networks must be of"),
        (["--layouts", "hwcn"], "--layouts must be of"),
        (["--resume"], "--resume needs --out"),
        (
            ["--device", "cpu", "--threads", "2", "--cpu-time"],
            "--cpu-time needs --device cpu --threads 1, got --device cpu and 2 threads",
        ),
    ],
)
def test_wrong_arguments(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        kernels.main(argv)
    assert end.value.code == 2
    assert why in capsys.readouterr().err


def test_unknown_device_to_predict(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--predict", "H300"]) == 2
    assert "device must be one of GTX 1080 Ti" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_every_table_of_a_prediction_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    argv = ["--predict", "GTX 1080 Ti", "--networks", "mobilenet_v2", "--dtypes", "fp32", "--layouts", "nhwc,nchw"]
    assert kernels.main([*argv, "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line.startswith("#")]
    assert len(headings) == 6
    assert all(heading.startswith("### PREDICTION, not a measurement: ") for heading in headings)
    assert printed.startswith("**PREDICTION.**")
    assert " %" not in printed.replace("within 5 % of", "")  # no share of a roofline that was assumed to be reached
    assert kernels.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("file", sorted(RESULTS.glob("prediction_*.md")), ids=lambda file: file.stem)
def test_a_committed_prediction_is_what_its_command_prints(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device, dtype, layout = file.stem.removeprefix("prediction_").split("_")
    assert kernels.main(["--predict", device.upper(), "--dtypes", dtype, "--layouts", layout]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert file.read_text().startswith("**PREDICTION.**")


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def row(kind: str, weight: tuple[int, ...], **us: float) -> dict[str, Any]:
    case = {"weight": weight, "groups": 1}
    return {"kind": kind, "case": case, "us": us, "pick": "gram", "roofline_us": {"gram": 4.0}, "status": "ok"}


def test_targets_by_hand() -> None:
    rows = [
        row("expanding", (64, 16, 1, 1), auto=5, wgrad=20, user=30),
        row("expanding", (64, 16, 1, 1), auto=10, wgrad=10, user=15),
        row("square", (16, 16), auto=8, wgrad=8, user=8),
    ]
    verdicts = {v.target.split(",")[0]: v for v in targets.targets(rows, "bf16", "cuda")}
    assert verdicts["expanding 1x1 and linear (K >= 2C)"].reached == pytest.approx(2)  # of 4 and 1
    assert verdicts["expanding 1x1 and linear (K >= 2C)"].met is False
    assert verdicts["every layer over (b)"].met is True
    assert verdicts["gram"].reached == pytest.approx(0.4)
    assert verdicts["depthwise"].cells()[2:] == ("-", "-", "no data")
    only = targets.targets(rows, "fp32", "cuda")
    assert [v.reached for v in only] == [pytest.approx(4 ** (1 / 3))]
    on_cpu = {v.target: v for v in targets.targets(rows, "fp32", "cpu")}
    assert on_cpu["expanding 1x1 and linear, K >= 4C, median over (a)"].reached == pytest.approx(2.5)
    assert on_cpu["expanding 1x1 and linear, K >= 4C, median over (a)"].most == pytest.approx(3.75)  # of 20 and 10 over 4
    assert on_cpu["every convolution over (b), the least"].reached == pytest.approx(1.5)
    assert on_cpu["all, geometric mean over (d)"].met is None


def test_networks_are_weighted_by_how_often_a_layer_occurs() -> None:
    rows = {
        "a|fp32|nhwc": row("square", (4, 4), auto=1000, wgrad=2000, user=3000),
        "b|fp32|nhwc": row("square", (4, 4), auto=500, wgrad=500, user=500),
    }
    networks = [{"name": "net", "batch": 2, "layers": [("a", 3), ("b", 2), ("missing", 1)]}]
    line = tables._networks(networks, rows, "fp32", "nhwc").splitlines()[-1]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["net b2", "5/6", "4.00", "7.00", "10.0", "1.75x", "2.50x"]


def test_reduced_batches_stay_below_the_limit() -> None:
    for layer in layers("resnet50", 64):
        small = reduced(layer.case, 4e9)
        assert small.x[1:] == layer.case.x[1:]
        each = layer.geometry.wgrad_flops / layer.case.x[0]
        assert small.x[0] == 1 or small.x[0] * each <= 4e9
        assert small.x[0] == layer.case.x[0] or (small.x[0] + 1) * each > 4e9


@pytest.mark.parametrize("name", ["conv3x3", "grouped3x3", "depthwise3x3-stride2", "expand1x1", "linear-sequence"])
def test_the_baselines_compute_the_same_update(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    steps = {}
    for what in functions(operands(case, "fp32", "nchw", "cpu"), compiled=False, unfold=True):
        o = operands(case, "fp32", "nhwc", "cpu")
        o.weight = o.weight.double()  # so that so small a step is seen
        before = o.weight.clone()
        if what == "wgrad":
            o.write(o.wgrad())
        else:
            o.x, o.z, o.like = o.x.double(), o.z.double(), o.like.double()
            o.bias = None if o.bias is None else o.bias.double()
            functions(o, compiled=False, unfold=True)[what]()
        steps[what] = o.weight - before
    assert steps.keys() >= {"auto", "direct", "library", "wgrad", "user"}
    assert all(relative_error(step, steps["user"]) < 1e-5 for step in steps.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["conv3x3", "linear"])
def test_the_timed_weight_gradient_is_one_operation_of_the_library(name: str, dtype: str) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not func.is_view:
                called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    case = next(case for case in CASES if case.name == name)
    o, called = operands(case, dtype, "nhwc", "cpu"), list[str]()
    with Seen():
        o.wgrad()
    assert called == ["mm" if case.dims == 0 else "convolution_backward"]


def test_the_judge_notices_small_errors() -> None:
    case = next(case for case in CASES if case.name == "expand1x1")
    o = operands(case, "fp32", "nhwc", "cpu")
    judge = Judge(case, o.x, o.z, o.weight, o.bias)
    for algorithm in case.cpu_algorithms:
        d = ops.correlation(o.x, o.z, o.weight, bias=o.bias, algorithm=algorithm)
        assert judge.judge(d, algorithm).ok
        assert judge.judge(d / d.double().norm(), algorithm, direction=True).ok
        assert not judge.judge(d * 1.00001, algorithm).ok
        assert not judge.judge(d * float("nan"), algorithm).ok


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has no fp32_precision")
def test_the_judge_reads_the_flag_of_the_library_that_multiplies() -> None:
    """Set by the newer API, after which the older one cannot be read."""
    allowed = {}
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        for name in ("linear", "conv3x3"):
            case = next(case for case in CASES if case.name == name)
            x, weight, bias = case.sample()
            judge = Judge(case, x, case.forward(x, weight, bias), weight, bias)
            allowed[name] = judge.judge(torch.zeros(case.weight), "direct").allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert allowed["linear"] >= FLOORS["tf32"] > allowed["conv3x3"]


def test_an_overflow_of_theirs_excuses_nothing() -> None:
    case = Case("", (129, 4), (6, 4))
    x = torch.full(case.x, 60.0, dtype=torch.float16)
    z = torch.full((129, 6), 60.0, dtype=torch.float16)  # sums of 129 * 3600 end beyond fp16
    judge = Judge(case, x, z, torch.zeros(case.weight), None)
    d = torch.full(case.weight, 129 * 3600.0)
    assert judge.judge(d, "direct").ok
    assert not judge.judge(d * 1.001, "direct").ok
