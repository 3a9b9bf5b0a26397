"""``localsgd train`` under torchrun: processes killed, nodes that join, what each of them says."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from pictures import damage, files_of_shares
from same_runs import assert_same_run

from localsgd_ext.__main__ import main
from localsgd_ext.train import checkpoint, processes, rundir
from localsgd_ext.train.files import read_json, read_json_lines
from localsgd_ext.train.processes import World

OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # a new one after a restart


def torchrun(
    out: Path,
    options: list[str],
    *more: str,
    first: Sequence[str] = ("--standalone", "--nproc-per-node", "2"),
    changes: Mapping[str, str] | None = None,
    script: Sequence[str] = ("-m", "localsgd_ext"),
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *first, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONFAULTHANDLER": "1", **(changes or {})}
    return subprocess.Popen(
        [*command, *script, "train", *options, "--out", str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_killed_and_all_started_again(victim: int, tmp_path: Path, tiny_flags: list[str]) -> None:
    """As torchrun does it, from the last checkpoint; no flag is given for it."""
    options = [*tiny_flags, "--train-size", "960", "--epochs", "6", "--local-lr", "0.001"]
    if victim == 1:  # the batch grows after the second epoch
        options += [
            "--method",
            "local",
            "--memory-budget",
            "3MB",
            "--lr-scaling",
            "linear",
            "--sync",
            "2",
            "--nan-policy",
            "skip",
        ]
    undisturbed = torchrun(tmp_path / "undisturbed", options)
    disturbed = torchrun(tmp_path / "disturbed", options, "--max-restarts", "1")
    try:
        deadline = time.monotonic() + 240
        while not checkpoint.path_of(tmp_path / "disturbed", 3).exists():
            assert disturbed.poll() is None, disturbed.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = [p for p in psutil.Process(disturbed.pid).children() if p.environ().get("RANK") == str(victim)]
        assert len(workers) == 1
        workers[0].send_signal(signal.SIGKILL)
        outputs = [process.communicate(timeout=240)[0] for process in (undisturbed, disturbed)]
    finally:
        for process in (undisturbed, disturbed):
            process.terminate()  # not killed: its workers would live on
    assert [undisturbed.returncode, disturbed.returncode] == [0, 0], "\n".join(outputs)
    assert outputs[0].count("epoch 6/6") == 1  # the first process alone speaks
    assert "resuming after epoch" in outputs[1]
    assert "resuming after epoch" not in outputs[0]
    assert_same_run(tmp_path / "undisturbed", tmp_path / "disturbed")
    metrics = read_json_lines(tmp_path / "disturbed" / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["boundary"] > 0
    assert [m["batch_size"] for m in metrics] == ([16] * 6 if victim == 0 else [16, 16, 32, 32, 32, 32])
    assert read_json(tmp_path / "disturbed" / "summary.json")["epochs"] == 6


THREADS_AFTER_TRAINING = """
import os, sys
from pathlib import Path
from localsgd_ext.__main__ import main
from localsgd_ext.train.loop import Trainer

def threads_of_gloo():
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # it has ended
            pass
    return sorted(name for name in names if "gloo" in name)

def say(what, value):
    sys.stdout.flush()
    os.write(1, f"\\nof rank {os.environ['RANK']} {what}: {value}\\n".encode())  # in one piece

run_epoch = Trainer.run_epoch
def watched(self):
    run_epoch(self)
    say("in training", len(threads_of_gloo()) > 0)
Trainer.run_epoch = watched
code = main(sys.argv[1:])
say("afterwards", threads_of_gloo())
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc, for the names of threads")
def test_no_thread_of_gloo_s_outlives_the_training(tmp_path: Path, tiny_flags: list[str]) -> None:
    """It would abort the process if it let go of a tensor while the interpreter shuts down: pytorch/pytorch#179291."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS_AFTER_TRAINING)
    run = torchrun(tmp_path / "run", [*tiny_flags, "--epochs", "1"], script=[str(script)])
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    said = sorted(line for line in output.splitlines() if line.startswith("of rank"))
    assert said == [f"of rank {rank} {what}" for rank in (0, 1) for what in ("afterwards: []", "in training: True")], output


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_process_of_the_second_node_killed(tmp_path: Path, tiny_flags: list[str]) -> None:
    """Two torchruns that meet as on two machines, by the README's command but for what one machine needs: each restarts its own process and
    counts that by itself."""
    options = [*tiny_flags, "--train-size", "960", "--epochs", "6", "--local-lr", "0.001", "--method", "local"]
    port, more = free_port(), ["--nnodes", "2", "--max-restarts", "3"]
    nodes = [
        torchrun(tmp_path / "run", options, *more, *node_of(port, host), first=[], changes=OWN_STORE) for host in (True, False)
    ]
    try:
        deadline = time.monotonic() + 240
        while not checkpoint.path_of(tmp_path / "run", 3).exists():
            for node in nodes:
                assert node.poll() is None, node.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (worker,) = psutil.Process(nodes[1].pid).children()
        worker.send_signal(signal.SIGKILL)
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert sum(output.count("resuming after epoch") for output in outputs) == 1
    whole = torchrun(tmp_path / "whole", options)
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_another_torchrun_s_run_is_not_taken_for_this_one_s(tmp_path: Path, tiny_flags: list[str]) -> None:
    """Its first attempt is refused, and so must be the restarted ones."""
    assert main(["train", *tiny_flags, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    before = (tmp_path / "run" / "model.pt").read_bytes()
    for launch in ("", f"{socket.gethostname()} 1 1"):
        if launch:
            (tmp_path / "run" / rundir.LAUNCH).write_text(launch)
        again = torchrun(tmp_path / "run", [*tiny_flags, "--epochs", "1"], "--max-restarts", "1")
        output, _ = again.communicate(timeout=240)
        assert again.returncode != 0, output
        assert output.count("exists and is not empty") == 2, output
        assert "resuming" not in output
    assert (tmp_path / "run" / "model.pt").read_bytes() == before


MISTAKES = [
    (["train", "--method", "prunetrain"], "--method prunetrain runs in one process, got 2"),
    (["train", "--method", "stochastic-depth"], "--method stochastic-depth runs in one process, got 2"),
    (["train", "--t-shift", "far"], "--t-shift must be auto"),
    (["compare", "--methods", "sgd,local"], "compare runs in one process, got 2"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_mistakes_end_in_one_message_of_the_first_process(
    command: list[str],
    message: str,
    tmp_path: Path,
    tiny_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = dist.HashStore()
    for rank in (0, 1):
        world = World(rank, 2, store=store)
        monkeypatch.setattr(processes, "started", lambda world=world: contextlib.nullcontext(world))
        assert main([*command, *tiny_flags, "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.count(f"Error: {message}") == (1 if rank == 0 else 0)
    assert not (tmp_path / "run").exists()


def test_what_only_some_processes_have_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", timedelta(milliseconds=20))
    here = socket.gethostname()
    store = dist.HashStore()
    first, second, third, fourth = (World(rank, 4, store=store) for rank in range(4))
    assert third.last_words("no disk") == f"process 3 of 4 on {here}: no disk"  # the first one has not failed
    assert fourth.last_words("no disk") is None  # said already
    assert first.last_words("no data") == "no data"
    assert second.last_words("no data") is None
    assert second.last_words("no memory") == f"process 2 of 4 on {here}: no memory"
    assert World(1, 2).last_words("alone") == f"process 2 of 2 on {here}: alone"

    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise dist.DistNetworkError("Connection reset by peer")

    assert World(0, 2, store=Gone()).last_words("no data") == "no data"
    assert World(1, 2, store=Gone()).last_words("no data") == f"process 2 of 2 on {here}: no data"


def outputs_of(*torchruns: subprocess.Popen[str]) -> list[str]:
    """What they print until they end."""
    try:
        return [process.communicate(timeout=240)[0] for process in torchruns]
    finally:
        for process in torchruns:
            process.terminate()  # not killed: its workers would live on


def node_of(port: int, host: bool, *more: str) -> list[str]:
    """Options of one of several torchruns that meet as on several machines, but for what one machine needs."""
    options = ["--nproc-per-node", "1", "--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    is_host = f"is_host={int(host)}"  # which cannot be told by the address here
    return [*options, "--local-addr", "127.0.0.1", "--rdzv-conf", ",".join([is_host, *more])]


def test_damaged_pictures_of_every_process_are_named(folders: Path, tmp_path: Path) -> None:
    """A share is one picture here: a damaged one leaves nothing of it."""
    files = files_of_shares(folders, 1)
    lost = [*files[0][1], *files[4][0], *files[4][1], *files[11][1]]
    damaged = damage(folders, *lost, "val/cat/1.png", "val/dog/0.png")  # of the second process and of the first one
    flags = ["--data", "imagenet", "--model", "small_resnet", "--method", "freeze", "--device", "cpu", "--root", str(folders)]
    flags += ["--image-size", "32", "--workers", "0", "--batch-size", "2", "--epochs", "1"]
    (output,) = outputs_of(reporting := torchrun(tmp_path / "run", flags))
    assert reporting.returncode == 0, output
    (entry,) = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert (entry["unreadable_images"], entry["mini_batches"]) == (6, 12)
    assert entry["test_accuracy"] * 12 == pytest.approx(round(entry["test_accuracy"] * 12))
    log = (tmp_path / "run" / rundir.LOG).read_text()
    again = "(4 times a whole share of a mini-batch, another of which was repeated)"
    assert f"epoch 1: 6 pictures could not be read and were left out {again}: " in log
    assert sum(f"{path} ({why})" in output for path, why in damaged.items()) == 5
    assert "; and 1 more, in the log\n" in output
    assert all(f" {path} could not be read: {why}\n" in log for path, why in damaged.items())


def test_an_error_of_the_second_node_alone_is_said_there(folders: Path, tmp_path: Path) -> None:
    flags = ["--data", "imagenet", "--model", "small_resnet", "--method", "sgd", "--device", "cpu", "--image-size", "32"]
    flags += ["--workers", "0", "--batch-size", "2", "--epochs", "1"]
    port = free_port()
    nodes = [
        torchrun(tmp_path / "run", [*flags, "--root", root], "--nnodes", "2", *node_of(port, host), first=[], changes=OWN_STORE)
        for host, root in ((True, str(folders)), (False, "/nowhere"))
    ]
    outputs = outputs_of(*nodes)
    assert all(node.returncode != 0 for node in nodes)
    said = f"Error: process 2 of 2 on {socket.gethostname()}: /nowhere/train is missing; "
    assert sum(output.count(said) for output in outputs) == 1, "\n".join(outputs)
    assert sum(output.count("is missing") for output in outputs) == 1


def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    flags = ["--data", "imagenet", "--model", "small_resnet", "--device", "cpu", "--root", "/nowhere"]
    (output,) = outputs_of(failing := torchrun(tmp_path / "run", flags))
    assert failing.returncode != 0
    assert output.count("Error: /nowhere/train is missing") == output.count("/nowhere/train is missing") == 1, output


def test_a_second_node_that_joins_restarts_the_run_where_it_was(tmp_path: Path, tiny_flags: list[str]) -> None:
    """torchrun starts the processes again, and counts no restart: nothing has failed."""
    options = [*tiny_flags, "--train-size", "320", "--epochs", "10000", "--method", "sgd"]
    port, run = free_port(), tmp_path / "run"
    nodes: list[subprocess.Popen[str]] = []

    def recorded() -> list[int]:
        """Reductions in each epoch: none by one process alone."""
        return [entry["reductions"] for entry in read_json_lines(run / "metrics.jsonl")]

    def wait_until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            for node in nodes:
                assert node.poll() is None, node.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    try:
        for host in (True, False):
            more = ["--nnodes", "1:2", "--max-restarts", "0", *node_of(port, host, "last_call_timeout=1")]
            nodes.append(torchrun(run, options, *more, first=[], changes=OWN_STORE))
            wait_until(lambda reductions=0 if host else 20: recorded()[-1:] == [reductions])
    finally:
        for node in nodes:
            node.terminate()
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert sum(output.count("resuming after epoch") for output in outputs) == 1, "\n".join(outputs)
    assert (run / rundir.LOG).read_text().count(" started with ") == 1
    alone = recorded().count(0)
    assert recorded() == [0] * alone + [20] * (len(recorded()) - alone)
