"""Kills training runs with SIGKILL at random moments and lets them go on, until they end; as a script.

``python tests/train/kill.py DIR TRIALS SEED`` prints one line of JSON for each trial: the method, for each kill how it came and
how many epochs were recorded then, and whether the boundary moved or channels were removed in the run. This process imports
everything once and never computes; every run is a fork of it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401  # what the runs need is imported before they are forked
from same_runs import assert_same_run, metrics

from localsgd_ext.__main__ import main
from localsgd_ext.train import cli, rundir  # noqa: F401

METHODS = (
    "--method local --local-lr 0.001 --refresh 3 --sample 0.5",
    "--method prunetrain --lasso-ratio 0.9 --train-size 1120 --lr 0.01",
    "--method stochastic-depth",
    "--method freeze --memory-budget 3.8MB --lr-scaling linear --nan-policy skip",
    "--method sgd --lr-schedule step --lr-step 2",
)
COMMON = (
    "--data fake --model small_resnet --device cpu --train-size 320 --test-size 40 --image-size 8 --batch-size 16 --epochs 5 "
    "--lr 0.02 --alpha 9"
)
TIMEOUT = 120.0


def start(arguments: list[str], log: Path, before: Callable[[], None]) -> int:
    """``localsgd *arguments`` in a process of its own, its output in ``log``; ``before`` is called there first."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        before()
        code = main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, until: float) -> int | None:
    """The exit status of ``child``, or ``None`` if it is still running at the time ``until``."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def die_at_flush(count: int, after: bool) -> None:
    """This process kills itself at its ``count``-th flush to disk, right before or right after it."""
    fsync, left = os.fsync, count

    def deadly(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = deadly


def once(arguments: list[str], out: Path, log: Path, before: Callable[[], None], kill_after: float) -> bool:
    """Begin or continue the run in ``out``. Returns whether it was killed, and raises if it failed by itself."""
    resume = (out / rundir.CONFIG).exists()
    command = ["train", "--resume"] if resume else ["train", *arguments]
    child = start([*command, "--out", str(out)], log, before)
    code = wait(child, time.monotonic() + kill_after)
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = wait(child, time.monotonic() + TIMEOUT)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")
    return code != 0


def trial(directory: Path, number: int, seed: int) -> dict[str, Any]:
    """One run, killed one to four times; raises unless it ends as the undisturbed one of its method."""
    rng = random.Random(1000 * seed + number)
    method = METHODS[number % len(METHODS)]
    arguments = [*COMMON.split(), *method.split()]
    log = directory / "log.txt"
    undisturbed = directory / f"undisturbed-{number % len(METHODS)}"
    lasted = directory / f"{undisturbed.name}.seconds"
    if not lasted.exists():
        began = time.monotonic()
        once(arguments, undisturbed, log, lambda: None, TIMEOUT)
        lasted.write_text(str(time.monotonic() - began))
    whole = float(lasted.read_text())
    victim, kills = directory / f"killed-{number}", []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.5:
            flush, after = rng.randint(1, 16), rng.random() < 0.5
            how = f"{'after' if after else 'before'} flush {flush}"
            killed = once(arguments, victim, log, lambda n=flush, a=after: die_at_flush(n, a), TIMEOUT)
        else:
            share = rng.random()
            how = f"after {share:.2f} of the time"
            killed = once(arguments, victim, log, lambda: None, share * whole)
        if killed:
            kills.append({"how": how, "epochs": rundir.epochs_done(victim)})
    once(arguments, victim, log, lambda: None, TIMEOUT)
    assert_same_run(undisturbed, victim)
    first, last = metrics(victim)[0], metrics(victim)[-1]
    changed = first["boundary"] < last["boundary"] or first["parameters"] > last["parameters"]
    return {"trial": number, "method": method, "kills": kills, "changed": changed}


if __name__ == "__main__":
    plt.switch_backend("agg")
    gc.freeze()
    for i in range(int(sys.argv[2])):
        print(json.dumps(trial(Path(sys.argv[1]), i, int(sys.argv[3]))), flush=True)
