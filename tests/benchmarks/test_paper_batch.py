"""Table 3 and the batch of figure 4: runs of several processes, whose batch grows."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from paper_runs import ENVIRONMENT, NETWORK, SMOKE

from benchmarks import ROOT, paper
from benchmarks.experiments import batch, parallel, suite
from benchmarks.experiments.cells import Variant, digest
from benchmarks.experiments.scales import SCALES, Study
from benchmarks.experiments.store import Store, line
from benchmarks.experiments.timing import Timings
from localsgd_ext.batch_growth import SavedMemory
from localsgd_ext.train import data
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Silence
from localsgd_ext.train.rundir import WatchedRunDirectory


def entry(variant: Variant, sizes: list[int], seconds: float) -> dict[str, Any]:
    """A line of the store: a run with mini-batches of ``sizes``, epoch by epoch, each of which reduced 2**20 bytes."""
    metrics = [
        {
            "num_layers": 14, "train_images": 64, "test_images": 40, "elapsed_train_seconds": seconds, "boundary": epoch,
            "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "multiply_adds": 1.0, "saved_activation_bytes": 2**20,
            "peak_device_bytes": None, "lr": 0.1, "local_lr": None, "batch_size": size, "reductions": 64 // size,
            "reduced_bytes": 2**20 * (64 // size)
        }
        for epoch, size in enumerate(sizes)
    ]  # fmt: skip
    return line(SMOKE.config(NETWORK, variant.method, 0, **variant.flags), metrics, ENVIRONMENT, variant.processes)


def kept(directory: Path) -> Store:
    store = Store(directory)
    for variant in batch.variants(SMOKE, NETWORK):
        doubles, grows = batch.DOUBLES in variant.label, batch.GROWS in variant.label
        sizes = [16, 32, 64, 64] if grows else [16, 16, 32, 32] if doubles else [16] * 4
        store.add(NETWORK, entry(variant, sizes, 80.0 if doubles else 100.0))
    return store


def cells_of(text: str, start: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_table3_by_hand(tmp_path: Path) -> None:
    text = suite.report("table3", SMOKE, kept(tmp_path), Timings())
    sgd, doubled = cells_of(text, "SGD"), cells_of(text, "freezing, batch doubles")
    assert sgd[4:] == ["8", "4, 4", "100", "100", "1.00x", "1.00x"]
    assert doubled[4:] == ["8, 16 from epoch 3", "4, 2", "75.0", "75.0", "1.00x", "1.25x"]
    assert cells_of(text, f"LoCal+SGD, literal, {batch.GROWS}")[4:7] == ["8, 16 from epoch 2, 32 from epoch 3", "4, 1", "50.0"]
    assert cells_of(text, "the paper's ResNet-50, 4 devices")[4:7] == ["64, 128 from epoch 33", "", "67.8 (by arithmetic)"]
    assert "freezing, batch doubles, against freezing: 25.0 % fewer mini-batches, 20.0 % less wall-clock time" in text
    assert "2 devices of 2.9 MiB each" in text
    assert "batch 16 over 2 processes" in text


def test_figure4_has_the_batch_as_trained(tmp_path: Path) -> None:
    """The cells are table 3's: nothing is trained twice."""
    store = kept(tmp_path)
    text = suite.report("figure4", SMOKE, store, Timings())
    (head,) = [line for line in text.splitlines() if line.startswith("| batch of each of 2 devices of 2.9 MiB")]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == ["1", "2", "3", "4"]
    assert cells_of(text, "as trained: LoCal+SGD, literal, batch doubles")[1:] == ["8.00 (1.0)"] * 2 + ["16.0 (1.0)"] * 2
    assert "Not trained yet, small_resnet on fake: SGD (2 seeds)" in text  # of one process: another run than table 3's


def test_runs_of_several_processes_are_runs_of_their_own() -> None:
    alone, shared = (SMOKE.cell(NETWORK, Variant("SGD", "sgd", {}, processes), 0) for processes in (1, 2))
    assert alone.config is not None
    assert alone.key == digest(alone.config)  # as it was called before there were others
    assert shared.key == f"{alone.key}-2"


def test_steps_of_one_process_do_not_tell_their_time(tmp_path: Path) -> None:
    store = kept(tmp_path)
    store.add(NETWORK, entry(grown := Variant("grown", "sgd"), [16, 32], 1.0))
    store.add(NETWORK, entry(plain := Variant("plain", "sgd", {"epochs": 2}), [16, 16], 1.0))
    found = [store.get(SMOKE.cell(NETWORK, v, 0)) for v in (batch.variants(SMOKE, NETWORK)[0], grown, plain)]
    assert [None if r is None else Timings().steps_of_sgd(r) for r in found] == [None, None, 8]


def test_what_the_paper_trained() -> None:
    full = Study(SCALES["full"], root="/data")
    for model, rate in (("resnet50", 0.1), ("mobilenet_v2", 0.05)):
        by_label = {v.label: v for v in batch.variants(full, ("imagenet", model))}
        cell = full.cell(("imagenet", model), by_label["LoCal+SGD, literal, batch doubles"], 0)
        assert cell.config is not None, cell.missing
        c = cell.config
        assert (c.batch_size, c.max_batch_size, c.lr, c.lr_scaling) == (256, 512, rate, "none")
        assert (c.memory_budget, cell.variant.processes, c.refresh) == (10**10, 4, 0)
        assert all(v.processes == 4 and v.flags["batch_size"] == 256 for v in by_label.values())
    assert {v.processes for v in batch.variants(Study(SCALES["gpu"]), ("glyphs", "resnet18"))} == {1}


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_the_batch_fits_from_the_start_and_twice_of_it_later(scale: str, tmp_path: Path) -> None:
    study = Study(SCALES[scale])
    network = study.networks("imagenet")[0]
    sizes = {"train_size": 64, "test_size": 40}
    config = study.config(network, "freeze", **{**sizes, "memory_budget": study.scale.device_memory})
    config = config.replace(batch_size=config.batch_size // study.scale.devices)  # what one of them has
    trainer = Trainer(config, data.load(config), WatchedRunDirectory(tmp_path, config), Silence())
    trainer.run_epoch()  # the optimizer has its momentum
    assert trainer.local is not None
    measure = SavedMemory(trainer.local, torch.zeros(config.batch_size, 3, trainer.data.image_size, trainer.data.image_size))
    start = measure(True)
    assert start is not None
    assert start.at(config.batch_size) < study.scale.device_memory < start.at(2 * config.batch_size)
    trainer.local._apply_boundary(int(config.l_max * trainer.num_layers))
    end = measure(False)
    assert end is not None
    assert end.at(2 * config.batch_size) < study.scale.device_memory


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes each, started by torchrun; killed once, and again when all is done."""
    words = ["table3", "--scale", "smoke", "--set", "train_size=32", "--set", "epochs=3", "--seeds", "1"]
    words += ["--only", "/(SGD|freezing, batch doubles)/", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    victim = subprocess.Popen([sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "paper.py"), *words])
    deadline = time.monotonic() + 240
    while not list((tmp_path / "work").glob("smoke/*/checkpoint-*.ckpt")):
        assert victim.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started = psutil.Process(victim.pid).children(recursive=True)
    victim.kill()
    victim.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert paper.main(words) == 0
    printed = capsys.readouterr()
    assert re.search(r"fake/small_resnet/freezing, batch doubles/seed0  epoch 3/3 .* batch 32 ", printed.err)
    assert not any((tmp_path / "work" / "smoke").iterdir())
    (file,) = (tmp_path / "out" / "smoke").glob("*.jsonl")
    entries = {line["config"]["method"]: line for line in read_json_lines(file)}
    assert entries["sgd"]["processes"] == entries["freeze"]["processes"] == 2
    assert entries["sgd"]["epochs"]["reductions"] == [2, 2, 2]
    assert entries["freeze"]["epochs"]["reductions"] == [2, 2, 1]
    assert entries["freeze"]["epochs"]["batch_size"] == [16, 16, 32]
    assert cells_of(printed.out, "freezing, batch doubles")[4:7] == ["8, 16 from epoch 3", "2, 1", "83.3"]
    assert paper.main(words) == 0
    assert "epoch" not in capsys.readouterr().err  # nothing is left to train


def test_what_a_process_says_when_it_fails(tmp_path: Path) -> None:
    config = SMOKE.config(NETWORK, "sgd").replace(data="cifar10", image_size=None)
    with pytest.raises(RuntimeError, match=r"2 processes ended with 1:[\s\S]*--data cifar10 needs --root"):
        parallel.train(config, tmp_path / "run", 2, Silence(), "a cell")


def test_torchrun_ends_with_the_process_that_started_it() -> None:
    """Even if that is killed, and its workers have nothing to say for a long time."""
    command = ["-c", parallel._TORCHRUN, "--standalone", "--nproc-per-node", "1", "--no-python", "sleep", "600"]
    parent = psutil.Popen([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, *{command!r}])"])
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not any(process.name() == "sleep" for process in started):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            started = parent.children(recursive=True)
        parent.kill()
        parent.wait()
        assert not psutil.wait_procs(started, timeout=60)[1]
    finally:
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
