"""A cell in several processes of this machine: ``localsgd train`` in each, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json_lines
from localsgd_ext.train.progress import Progress
from localsgd_ext.train.rundir import CONFIG, METRICS, RunDirectory

_EPOCH = re.compile(r"epoch \d+/\d+  ")
# torchrun, which ends with this process, even if that is killed: its workers would go on, and keep others out of the run.
_TORCHRUN = (
    "import ctypes, runpy, signal\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG\n"
    "runpy.run_module('torch.distributed.run', run_name='__main__')\n"
)
_SHOWN = 60  # lines of a failed run


def train(config: RunConfig, path: Path, processes: int, progress: Progress, name: str) -> list[dict[str, Any]]:
    """Begin the run in ``path``, or go on with it. Returns its metrics.

    Raises:
        RuntimeError: it failed; the end of what it printed is in the message.
    """
    if not (path / CONFIG).exists():
        RunDirectory(path, config, resume=False).close()
    command = [sys.executable, "-c", _TORCHRUN, "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "localsgd_ext", "train", "--resume", "--out", str(path)]
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",  # they are all here, and this host's name may lead nowhere
        **os.environ,
        "PYTHONFAULTHANDLER": "1",  # a crash in compiled code says where it was
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    printed: deque[str] = deque(maxlen=_SHOWN)
    progress.begin(name)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launched:
        assert launched.stdout is not None
        try:
            for line in launched.stdout:
                printed.append(line)
                if _EPOCH.match(line):
                    metrics = read_json_lines(path / METRICS)
                    progress.advance(metrics[-1]["train_images"] - metrics[-1]["train_images"] % config.batch_size)
                    progress.end(f"{name}  {line.partition('  left ')[0]}")
        except BaseException:
            launched.terminate()  # not killed: its workers would live on
            raise
    if launched.returncode:
        raise RuntimeError(f"{processes} processes ended with {launched.returncode}:\n{''.join(printed)}")
    return read_json_lines(path / METRICS)
