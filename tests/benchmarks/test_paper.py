"""benchmarks/paper.py: cells are trained once, go on after a kill, and tables come from the JSON alone."""

from __future__ import annotations

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
from paper_runs import QUICK, made, places
from PIL import Image

from benchmarks import ROOT, paper
from benchmarks.experiments import runner, suite
from benchmarks.experiments.cells import Variant, digest
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Store
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.rundir import LOCK

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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "seed=3"], "--set cannot say seed, --seeds does; got seed=3"),
        (["--set", "method=sgd"], "--set cannot say method, the experiment does"),
        (["--set", "root=/data"], "--set cannot say root, --root does"),
        (["--set", "preset=paper"], "--set cannot say preset, --scale does"),
        (["--set", "data=digits"], "--set cannot say data, --data does"),
        (["--set", "model=vgg13"], "--set cannot say model, --models does"),
        (["--set", "epochs=many"], "--set epochs must be of type int, got 'many'"),
        (["--set", "epochs=2.5"], "--set epochs must be of type int, got 2.5"),
        (["--set", "train_size=true"], "--set train_size must be of type int or null, got True"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_what_a_study_cannot_take(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["pareto", *QUICK, *words, *places(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_numbers_may_be_written_in_any_way(tmp_path: Path) -> None:
    words = ["lr=1", "t_shift=auto", "train_size=null", "min_loss_drop=0.5"]
    assert paper.main(["table2", *QUICK, *(w for word in words for w in ("--set", word)), "--list", *places(tmp_path)]) == 0


def test_a_table_of_fewer_seeds_has_a_name_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pareto", "--scale", "smoke", "--models", "small_vgg", *places(tmp_path)]
    store, study = Store(tmp_path / "out" / "smoke"), Study(SCALES["smoke"], models=("small_vgg",))
    for cell in suite.EXPERIMENTS["pareto"].cells(study):
        if cell.variant.label == "SGD":
            store.add(cell.network, made(cell.network, cell.variant, cell.seed, [0.5] * 4))
    assert paper.main([*words, "--table"]) == 0
    whole = tmp_path / "out" / "smoke" / "pareto-small_vgg.md"
    before = whole.read_bytes()
    assert "seeds 0, 1." in before.decode()
    capsys.readouterr()
    assert paper.main([*words, "--table", "--seeds", "1"]) == 0
    assert "Scale smoke, 1 seeds as asked for: " in capsys.readouterr().out
    assert whole.read_bytes() == before
    assert (whole.with_name("pareto-small_vgg-seeds=1.md")).exists()
    assert (whole.with_name("pareto-small_vgg-seeds=1.png")).exists()
    assert paper.main([*words, "--table", "--seeds", "2"]) == 0  # the scale's number
    assert sorted(path.name for path in whole.parent.glob("*.md")) == ["pareto-small_vgg-seeds=1.md", "pareto-small_vgg.md"]


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


def test_a_run_that_failed_is_free_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(runner.Trainer):
        def run_epoch(self) -> dict[str, Any]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "Trainer", Broken)
    assert paper.main(["table2", *QUICK, "--only", "vgg/SGD/seed0", *places(tmp_path)]) == 1
    (directory,) = (path for path in (tmp_path / "work" / "smoke").iterdir() if path.is_dir())
    locking = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", locking, str(directory / LOCK)], check=True)


class Noted(runner.Lines):
    """Progress that says what is left after each cell."""

    def __init__(self, total: int) -> None:
        super().__init__(total, lambda line: None)
        self.totals = [total]

    def drop(self, images: int) -> None:
        super().drop(images)
        self.totals.append(self._speed.total)


def test_progress_counts_what_others_did_and_not_what_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five cells of 96 pictures: meanwhile another process finishes the second and is at the third; the fourth fails after an epoch."""
    study = Study(SCALES["smoke"], flags={"train_size": 32, "epochs": 3}, models=("small_vgg",), seeds=1)
    rates = (0.1, 0.2, 0.3, 0.4, 0.5)
    cells = [study.cell(("fake", "small_vgg"), Variant(str(i), "sgd", {"lr": lr}), 0) for i, lr in enumerate(rates)]
    store, work = Store(tmp_path / "out"), tmp_path / "work"

    class Shared(runner.Trainer):
        def run_epoch(self) -> dict[str, Any]:
            if self.config.lr == 0.1 and self.epoch == 0:
                Store(tmp_path / "out").add(cells[1].network, made(cells[1].network, cells[1].variant, 0, [0.5] * 3))
            if self.config.lr == 0.4 and self.epoch == 1:
                raise RuntimeError("out of memory")
            return super().run_epoch()

    monkeypatch.setattr(runner, "Trainer", Shared)
    monkeypatch.setattr("paper_runs.SMOKE", study)
    shown: list[Noted] = []

    def show(total: int) -> Noted:
        shown.append(Noted(total))
        return shown[0]

    job = runner.Runner(store, work, show)
    work.mkdir()
    with job._directory(cells[2]).with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        left = job.run(cells)
    assert [cell.variant.label for cell in left] == ["2", "3"]
    (progress,) = shown
    assert progress.totals == [480, 480, 384, 320, 320]
    assert progress.done == 320
    assert progress._speed.remaining == 0


# ---------------------------------------------------------------- other data, and methods without a boundary


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

    others = {key: variant for key, variant in timing.VARIANTS.items() if key[0] != "freeze"}
    monkeypatch.setattr(timing, "VARIANTS", others)
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
