"""What a run ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import localsgd_ext
from localsgd_ext import ops


def describe(device: str) -> dict[str, Any]:
    """Versions, hardware, threads, source commit, and whether the compiled kernels are in use on ``device``."""
    import torchvision

    cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "localsgd_ext": localsgd_ext.__version__,
        "compiled_kernels": ops.is_compiled(device),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,  # type: ignore[no-untyped-call]
        "git_commit": git_commit(),
        "command": sys.argv,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of this package's source tree, with ``+`` if it has changes; ``None`` for an installed package. For a copy of
    the tree without its ``.git``, ``LOCALSGD_COMMIT`` in the environment names it."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():  # or a package installed into somebody else's repository would report theirs
        return os.environ.get("LOCALSGD_COMMIT") or None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit + ("+" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
