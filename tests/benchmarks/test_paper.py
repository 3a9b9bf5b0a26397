"""benchmarks/paper.py: cells are trained once, go on after a kill, and tables come from the JSON alone."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import ROOT, paper
from benchmarks.experiments import iso, overtime, pareto, suite, tuning
from benchmarks.experiments.cells import Variant, digest
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Result, Store, line
from benchmarks.experiments.timing import Shape, Timings
from localsgd_ext.train.files import read_json_lines

QUICK = ["--scale", "smoke", "--set", "train_size=32", "--set", "epochs=3"]
ENVIRONMENT = {
    "torch": "2", "cpu": "a", "gpu": None, "threads": 1, "localsgd_ext": "0", "git_commit": "abc", "compiled_kernels": True
}  # fmt: skip
SMOKE = Study(SCALES["smoke"])
NETWORK = ("fake", "small_resnet")


def places(directory: Path) -> list[str]:
    return ["--out", str(directory / "out"), "--work", str(directory / "work")]


def made(network: tuple[str, str], variant: Variant, seed: int, accuracies: list[float], macs: float = 1.0) -> dict[str, Any]:
    """A line of the store: a run that took ``macs`` an epoch."""
    config = SMOKE.config(network, variant.method, seed, **variant.flags)
    metrics = [
        {
            "num_layers": 14, "train_images": 64, "test_images": 40, "elapsed_train_seconds": 36.0, "boundary": epoch,
            "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": accuracy, "multiply_adds": macs,
            "saved_activation_bytes": 2**20 // (epoch + 1), "peak_device_bytes": None, "lr": 0.1, "local_lr": None
        }
        for epoch, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    return line(config, metrics, ENVIRONMENT, variant.processes)


def result(variant: Variant, seed: int, accuracy: float, macs: float = 1.0) -> Result:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.add(NETWORK, made(NETWORK, variant, seed, [accuracy / 100], macs))
        found = store.get(SMOKE.cell(NETWORK, variant, seed))
    assert found is not None
    return found


# ---------------------------------------------------------------- the command


def test_pareto_and_table2_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pareto", "table2", *QUICK, "--models", "small_vgg", "--seeds", "2", *places(tmp_path)]
    assert paper.main([*command, "--budget", "-1"]) == 3  # no cell is started
    assert paper.main([*command, "--only", "/SGD"]) == 0
    capsys.readouterr()
    assert paper.main(command) == 0
    printed = capsys.readouterr().out
    assert "## pareto: accuracy against cost" in printed
    assert "| at equal multiply-adds" in printed
    assert "| Hebb on minus off, same schedule and refresh |" in printed
    assert "| at equal time" not in printed  # nothing was timed
    assert "The paper: LoCal+SGD: up to 1.51x" in printed
    assert "Scale smoke, train_size 32, epochs 3:" in printed
    assert "core-hours of training" in printed
    assert not any((tmp_path / "work" / "smoke").iterdir())  # no checkpoints stay
    (file,) = (tmp_path / "out" / "smoke").glob("*.jsonl")
    configs = [json.dumps(entry["config"]) for entry in read_json_lines(file)]
    assert len(set(configs)) == len(configs)  # each run once

    # From the JSON alone, elsewhere.
    elsewhere = tmp_path / "elsewhere" / "out" / "smoke"
    elsewhere.mkdir(parents=True)
    shutil.copy(file, elsewhere)
    assert paper.main([*command[:-4], "--table", *places(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out == printed
    (picture,) = elsewhere.glob("pareto*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    assert paper.main([*command, "--timing", "0"]) == 0
    timed = capsys.readouterr().out
    assert "| at equal time" in timed
    assert "A step of SGD took " in timed
    assert paper.main([*command, "--list"]) == 0
    assert "SGD" not in capsys.readouterr().out  # nothing is left, but what has no method yet


@pytest.mark.parametrize("experiment", suite.EXPERIMENTS)
@pytest.mark.parametrize("baseline", [True, False])
def test_every_experiment_makes_tables_and_pictures_of_half_finished_seeds(
    experiment: str, baseline: bool, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    cells = suite.EXPERIMENTS[experiment].cells(SMOKE)
    random = np.random.default_rng(0)
    for cell in cells:
        sgd = cell.variant.label == "SGD"
        if cell.config is not None and store.get(cell) is None and (baseline if sgd else cell.seed == 0):
            accuracies = random.uniform(0.4, 0.9, cell.config.epochs).tolist()
            store.add(cell.network, made(cell.network, cell.variant, cell.seed, accuracies, random.uniform(0.5, 1)))
    report = suite.report(experiment, SMOKE, store, Timings())
    assert ("| SGD  " in report) == (baseline and experiment != "figure3")
    assert "Not trained yet, small_resnet on fake: " in report
    draw = suite.EXPERIMENTS[experiment].picture
    if draw is not None:
        assert draw(SMOKE, suite.finished(cells, store)).startswith(b"\x89PNG")
    nothing = suite.report(experiment, SMOKE, Store(tmp_path / "empty"), Timings())
    assert "Scale smoke: none of " in nothing
    assert "Not trained yet, small_resnet on fake: SGD (2 seeds)" in nothing


def test_what_cannot_be_trained_yet_is_named() -> None:
    cell = SMOKE.cell(NETWORK, Variant("new", "no-such-method"), 0)
    assert (cell.config, cell.missing) == (None, "localsgd_ext.train has no method no-such-method yet")
    unfit = SMOKE.cell(NETWORK, Variant("unfit", "freeze", {"l_max": 2.0}), 0)
    assert (unfit.config, unfit.missing) == (None, "--l-max must be in (0, 1), got 2.0")
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        Study(SCALES["smoke"], flags={"epochs": 0}).cell(NETWORK, Variant("SGD", "sgd"), 0)


def test_side_claims_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["section2", *QUICK, "--models", "small_vgg", "--seeds", "1", *places(tmp_path)]
    assert paper.main([*command, "--only", "SGD|freezing"]) == 0
    assert "Missing: times of back-propagation" in capsys.readouterr().out
    assert paper.main([*command, "--timing", "0"]) == 0
    printed = capsys.readouterr().out
    assert "| backward " in printed
    assert "against its local update, 9 layers: all together " in printed
    assert "freezing, SGD first minus local first, at the same cost:" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table9"], "EXPERIMENT must be all or of pareto"),
        (["pareto", "--set", "epochs"], "--set must be OPTION=VALUE"),
        (["pareto", "--set", "epocs=3"], "got 'epocs=3'"),
    ],
)
def test_wrong_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main(words)
    assert message in capsys.readouterr().err


def test_a_model_of_another_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["pareto", "--models", "resnet18", *places(tmp_path)]) == 2
    assert "--models resnet18: scale cpu has none of them" in capsys.readouterr().err


# ---------------------------------------------------------------- kills, and several processes


def test_a_cell_killed_in_the_middle_goes_on_bit_for_bit(tmp_path: Path) -> None:
    words = ["pareto", "--scale", "smoke", "--set", "train_size=640", "--set", "epochs=6"]
    words += ["--only", "resnet/refresh 1/4, quadratic to 90 %/seed0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "paper.py"), *words, *places(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    undisturbed, victim = start("undisturbed"), start("killed")
    work = tmp_path / "killed" / "work" / "smoke"
    deadline = time.monotonic() + 300
    while not list(work.glob("*/checkpoint-000[2-5].ckpt")):
        assert victim.poll() is None, victim.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not list((tmp_path / "killed" / "out").glob("smoke/*.jsonl"))

    again = start("killed")
    _, log = again.communicate(timeout=300)
    assert again.returncode == 0, log
    assert "resuming after epoch" in log
    undisturbed.communicate(timeout=300)
    entries = [read_json_lines(tmp_path / n / "out" / "smoke" / "fake-small_resnet.jsonl") for n in ("undisturbed", "killed")]
    assert [len(found) for found in entries] == [1, 1]
    assert entries[0][0]["epochs"] == entries[1][0]["epochs"]
    assert entries[0][0]["config"] == entries[1][0]["config"]


def test_a_cell_that_another_process_trains_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table2", *QUICK, "--only", "vgg/SGD/seed0", *places(tmp_path)]
    (cell,) = [c for c in suite.EXPERIMENTS["table2"].cells(Study(SCALES["smoke"], flags={"train_size": 32, "epochs": 3}))
               if c.name == "fake/small_vgg/SGD/seed0"]  # fmt: skip
    assert cell.config is not None
    work = tmp_path / "work" / "smoke"
    work.mkdir(parents=True)
    with (work / f"fake-small_vgg-sgd-seed0-{digest(cell.config)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert paper.main(words) == 3
        assert "another process is at it" in capsys.readouterr().err
    assert paper.main(words) == 0


def test_a_failing_cell_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.experiments import runner

    class Broken(runner.Trainer):
        def run_epoch(self) -> dict[str, Any]:
            if self.config.method == "freeze":
                raise RuntimeError("out of memory")
            return super().run_epoch()

    monkeypatch.setattr(runner, "Trainer", Broken)
    words = ["table2", *QUICK, "--only", "vgg/(SGD|freezing|refresh 1/4)/seed0", *places(tmp_path)]
    assert paper.main(words) == 1
    assert "fake/small_vgg/freezing/seed0 failed: RuntimeError: out of memory" in capsys.readouterr().err
    (file,) = (tmp_path / "out" / "smoke").glob("*.jsonl")
    assert [entry["config"]["method"] for entry in read_json_lines(file)] == ["sgd"]


def test_a_line_that_a_kill_cut_short_goes(tmp_path: Path) -> None:
    store, variant = Store(tmp_path), Variant("SGD", "sgd")
    store.add(NETWORK, made(NETWORK, variant, 0, [0.5]))
    with store.path(NETWORK).open("a") as file:
        file.write('{"id": "hal')
    assert store.get(SMOKE.cell(NETWORK, variant, 0)) is not None
    store.add(NETWORK, made(NETWORK, variant, 1, [0.25]))
    found = [store.get(SMOKE.cell(NETWORK, variant, seed)) for seed in (0, 1)]
    assert [r.accuracy for r in found if r is not None] == [50, 25]


# ---------------------------------------------------------------- cells


def test_an_option_that_is_new_leaves_the_names_of_old_runs() -> None:
    config = SMOKE.config(NETWORK, "sgd")
    assert digest(config) == digest(config.replace(root="/somewhere", workers=0))
    assert digest(config) == digest(config.replace(refresh=0))
    assert digest(config) == digest(config.replace(l_max=0.5, local_lr=1.0))  # nothing to SGD
    frozen = SMOKE.config(NETWORK, "freeze")
    assert digest(frozen) == digest(frozen.replace(local_lr=1.0))
    changed = [frozen, frozen.replace(refresh=4), frozen.replace(seed=1), frozen.replace(l_max=0.5), config]
    assert len({digest(one) for one in changed}) == 5


def test_the_full_scale_is_the_papers() -> None:
    study = Study(SCALES["full"], root="/data")
    assert study.networks("imagenet") == (("imagenet", "resnet50"), ("imagenet", "resnet34"), ("imagenet", "mobilenet_v2"))
    config = study.config(("cifar10", "resnet18"), "local-paper")
    assert (config.epochs, config.lr, config.lr_step, config.batch_size, config.local_lr) == (90, 0.05, 10, 64, 0.01)
    assert study.shortened(("cifar10", "resnet18"), 45) == {"epochs": 45, "lr_step": 5}
    assert Study(SCALES["full"], data="cifar100").networks("imagenet") == (("cifar100", "resnet18"), ("cifar100", "vgg13"))
    assert Study(SCALES["cpu"], data="cifar10").networks("cifar") == (("cifar10", "small_resnet"), ("cifar10", "small_vgg"))
    pairs = {cell.config.seed for cell in suite.EXPERIMENTS["pareto"].cells(Study(SCALES["cpu"])) if cell.config is not None}
    assert len(pairs) == 10


def test_cifar10_in_its_own_file_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: Any) -> tuple[str, str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return name, hashlib.md5(raw).hexdigest()

    parts = [{"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10] * 20} for i in range(6)]
    files = [write(f"part{i}", part) for i, part in enumerate(parts)]
    meta = write("meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", [list(f) for f in files[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [list(files[5])])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": meta[1]})
    words = ["table2", *QUICK, "--data", "cifar10", "--set", "test_size=20", "--only", "vgg/(SGD|freezing)/seed0"]
    assert paper.main([*words, *places(tmp_path)]) == 1  # no --root
    assert "--data cifar10 needs --root" in capsys.readouterr().err
    assert paper.main([*words, "--root", str(tmp_path), *places(tmp_path)]) == 0
    assert "### small_vgg on cifar10" in capsys.readouterr().out
    kept = (tmp_path / "out" / "smoke" / "cifar10-small_vgg.jsonl").read_text()
    assert str(tmp_path) not in kept  # where the data lay is nobody's business
    assert len(kept.splitlines()) == 2


def test_imagenet_as_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / split / name / f"{i}.png")
    sizes = [f"{name}={value}" for name, value in
             (("train_size", 12), ("test_size", 6), ("batch_size", 4), ("image_size", 16), ("workers", 0), ("epochs", 2))]  # fmt: skip
    words = ["table1", "--scale", "smoke", "--data", "imagenet", "--root", str(tmp_path), "--only", "vgg/(SGD|freezing)/seed0"]
    assert paper.main([*words, *(word for size in sizes for word in ("--set", size)), *places(tmp_path)]) == 0
    assert "imagenet: 12 training and 6 test pictures, batch 4; seeds 0." in capsys.readouterr().out


def test_a_method_without_a_boundary_is_timed_by_whole_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.experiments import timing

    for bn_stats in ("update", "freeze"):
        monkeypatch.delitem(timing.VARIANTS, ("freeze", bn_stats))
    words = ["table2", *QUICK, "--models", "small_vgg", "--seeds", "1", "--only", "vgg/(SGD|freezing)/", *places(tmp_path)]
    assert paper.main(words) == 0
    monkeypatch.setattr(timing, "WHOLE_RUN_HOURS", 0)
    assert paper.main([*words, "--timing", "0"]) == 0
    assert "small_vgg, freeze: a run takes 0.0 hours and is not made again" in capsys.readouterr().err
    monkeypatch.setattr(timing, "WHOLE_RUN_HOURS", 1)
    assert paper.main([*words, "--timing", "0"]) == 0
    (row,) = json.loads((tmp_path / "out" / "smoke" / timing.FILE).read_text())["rows"].values()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| freezing")]
    assert f"{row['sgd_ms'] / row['ms']:.2f}x" in line


# ---------------------------------------------------------------- what tables say


def test_interpolation_along_a_curve() -> None:
    curve = [(4.0, 80.0), (8.0, 90.0), (6.0, 88.0)]
    assert pareto.interpolated(curve, 5) == 84
    assert pareto.interpolated(curve, 7) == 89
    assert pareto.interpolated(curve, 8) == 90
    assert pareto.interpolated(curve, 8.1) is None
    assert pareto.interpolated([], 1) is None


def test_domination() -> None:
    points = {"cheap": (1.0, 80.0), "good": (3.0, 90.0), "bad": (2.0, 79.0), "worse": (3.0, 85.0), "twin": (3.0, 90.0)}
    assert pareto.dominated(points) == {"cheap": None, "good": None, "bad": "cheap", "worse": "twin", "twin": None}


def test_equal_cost_is_paired_by_seed() -> None:
    """Both seeds' SGD gains 4 points an epoch, from different levels; the method at 3.5 epochs' cost is 1 and 2 points above."""
    labels = {"whole": ["four"], "short": ["three"], "method": ["it"]}
    results = {
        "four": {s: result(Variant("SGD", "sgd"), s, 90.0 + s, 4) for s in (0, 1)},
        "three": {s: result(Variant("3", "sgd", {"epochs": 3}), s, 86.0 + s, 3) for s in (0, 1)},
        "it": {s: result(Variant("it", "freeze"), s, 89.0 + 2 * s, 3.5) for s in (0, 1)},
    }
    points = pareto.Points(labels, results, lambda r: r.macs)
    paired = points.against("it", ("whole", "short"))
    assert paired is not None
    assert (paired.n, paired.mean) == (2, pytest.approx(1.5))
    assert points.mean("it") == (3.5, 90.0)


def test_epochs_that_sgd_needs() -> None:
    curve = [(4.0, 80.0), (6.0, 84.0), (8.0, 90.0)]
    assert iso.epochs_needed(curve, 87) == 7
    assert iso.epochs_needed(curve, 91) is None
    assert iso.epochs_needed(curve, 79) is None  # three might do


def test_choices_under_a_budget() -> None:
    runs = {
        "SGD": {0: result(Variant("SGD", "sgd"), 0, 90, 10)},
        "slow": {0: result(Variant("s", "freeze"), 0, 89.95, 9)},
        "fast": {0: result(Variant("f", "freeze", {"alpha": 1.0}), 0, 89, 5)},
    }
    assert tuning.fastest(runs, ["slow", "fast", "absent"], 0.1) == "slow"
    assert tuning.fastest(runs, ["slow", "fast"], 1.0) == "fast"
    assert tuning.fastest(runs, ["slow", "fast"], 0.01) is None
    assert tuning.best_within(runs, ["slow", "fast"], 9) == "slow"
    assert tuning.best_within(runs, ["slow", "fast"], 8) == "fast"
    assert tuning.best_within(runs, ["slow", "fast"], 4) is None


def test_the_batch_that_fits() -> None:
    assert [overtime.largest_batch(64, now, 1000) for now in (1000, 501, 500, 250, 100)] == [64, 64, 128, 256, 512]
    assert overtime.chosen(3) == [0, 1, 2]
    assert (overtime.chosen(90)[0], overtime.chosen(90)[-1], len(overtime.chosen(90))) == (0, 89, 12)


def test_whole_runs_are_put_together_from_steps() -> None:
    sgd, frozen = Variant("SGD", "sgd"), Variant("f", "freeze", {"refresh": 4})
    entry = made(NETWORK, frozen, 0, [0.5, 0.5, 0.5])  # boundaries 0, 1 and 2; 4 steps an epoch
    key = Shape.of(SMOKE.config(NETWORK, "freeze")).key
    rows = {
        f"{key}|frozen|{boundary}": {"shape": key, "ms": ms, "sgd_ms": 10.0, "status": "ok"}
        for boundary, ms in ((1, 8.0), (2, 6.0))
    }
    timings = Timings(rows)
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.add(NETWORK, entry)
        run = store.get(SMOKE.cell(NETWORK, frozen, 0))
    assert run is not None
    assert timings.steps_of_sgd(run) == pytest.approx(4 * (1 + 0.25 + 0.75 * 0.8 + 0.25 + 0.75 * 0.6))
    assert Timings().steps_of_sgd(run) is None
    still = dataclasses.replace(run, config=run.config.replace(bn_stats="freeze"))
    assert timings.steps_of_sgd(still) is None  # measured as a variant of its own
    assert timings.steps_of_sgd(result(sgd, 0, 50)) == 4
    assert json.loads(json.dumps(entry)) == entry
