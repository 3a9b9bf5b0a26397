"""The stages of gpu_suite.py: which commands each runs, and what their exit statuses mean."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from localsgd_ext.train.files import read_json

BENCHMARKS = Path(__file__).resolve().parent
SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
TRAIN = ("--data", "glyphs", "--methods", "sgd,freeze,refresh,local", "--seeds", "1", "--epochs", "4", "--train-size", "4000")


class Unavailable(Exception):
    """A stage cannot run here, and it is nobody's fault; says why."""


@dataclass(frozen=True)
class Command:
    name: str
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    meanings: dict[int, str] = field(default_factory=dict)
    """Of exit statuses besides 0."""
    refusals: str = ""
    """A regular expression: the words by which a tool that ends with another status says that it does not work here."""
    proof: str = ""
    """What it prints if it came to its end: exit status 0 is not enough."""

    def status(self, rc: int | None, output: str = "") -> str:
        if rc is None:
            return "stopped"
        if rc == 0:
            return "passed" if re.search(self.proof, output, re.MULTILINE) else "failed"
        if self.refusals and re.search(self.refusals, output, re.MULTILINE | re.IGNORECASE):
            return "unavailable"
        return self.meanings.get(rc, "failed")


def no_gpu() -> str | None:
    """Why there is none, or None."""
    if torch.version.cuda is None:
        return f"a GPU is needed, and a PyTorch with CUDA; this is {torch.__version__}"
    if not torch.cuda.is_available():
        return "a GPU is needed, PyTorch sees none"
    return None


def python(*argv: str) -> list[str]:
    return [sys.executable, *argv]


def script(name: str, args: argparse.Namespace, *argv: str) -> list[str]:
    return python(str(BENCHMARKS / name), *argv)


def resumable(path: Path, args: argparse.Namespace) -> list[str]:
    """``--out`` and, where it has begun, ``--resume``; without --resume for the suite the old results go."""
    if not args.resume:
        path.unlink(missing_ok=True)
    return ["--out", str(path), *(["--resume"] if path.exists() else [])]


def build(args: argparse.Namespace) -> list[Command]:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    environment = {"LOCALSGD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return [Command("build_ext", python("setup.py", "build_ext", "--inplace"), environment)]


def parity(args: argparse.Namespace) -> list[Command]:
    argv = ["--device", args.device, *resumable(args.out / "parity_rows.json", args), "--budget", str(0.9 * args.budget)]
    return [Command("parity", script("gpu_parity.py", args, *argv), meanings={3: "stopped"})]


def pytest(args: argparse.Namespace) -> list[Command]:
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    # The project's own options name plugins that a bare machine lacks.
    options = ("-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", f"--junitxml={args.out / 'pytest.xml'}")
    return [Command("pytest", python("-m", "pytest", *options, "tests/gpu"), {"PYTHONPATH": str(ROOT)})]


def sanitizer(args: argparse.Namespace) -> list[Command]:
    tool = find_sanitizer()
    if tool is None:
        raise Unavailable("compute-sanitizer is neither on PATH nor in CUDA_HOME or /usr/local/cuda")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation each, so that overruns show
    # Exit statuses say nothing: the tool hands on the script's own, and Python has 1 and 2 for what went wrong before its first
    # line. Only the tool's own words, behind its mark, that it cannot work here are no failure.
    refusals = r"^=+ .*(device (is )?not supported|unable to find injection library|insufficient (permissions|privileges))"
    argv = script("gpu_once.py", args)
    return [
        Command(
            kind,
            [tool, "--tool", kind, "--error-exitcode", "9", *argv],
            environment,
            refusals=refusals,
            proof=r"^[1-9]\d* calls$",
        )
        for kind in SANITIZERS
    ]


def find_sanitizer() -> str | None:
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda") if home]
    places = [home / where / "compute-sanitizer" for home in homes for where in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.is_file() and os.access(p, os.X_OK)), None)


def graph(args: argparse.Namespace) -> list[Command]:
    return [Command("graph", script("gpu_graph.py", args, "--out", str(args.out / "graph_rows.json")))]


def kernels(args: argparse.Namespace) -> list[Command]:
    argv = [*resumable(args.out / "kernels_rows.json", args), "--budget", str(0.9 * args.budget), *shlex.split(args.kernels)]
    return [Command("kernels", script("kernels.py", args, "--device", "cuda", *argv), meanings={3: "stopped"})]


def train(args: argparse.Namespace) -> list[Command]:
    from localsgd_ext import __main__

    if missing := [name for name in __main__._NEEDED if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"localsgd needs {', '.join(missing)}")
    argv = python("-m", "localsgd_ext", "compare", *TRAIN, "--device", "cuda", "--out", str(args.out / "train"))
    if not args.resume:
        shutil.rmtree(args.out / "train", ignore_errors=True)
    elif (args.out / "train").exists():
        argv.append("--resume")
    return [Command("compare", argv, {"PYTHONPATH": str(ROOT)})]


STAGES: dict[str, Callable[[argparse.Namespace], list[Command]]] = {
    "build": build,
    "parity": parity,
    "pytest": pytest,
    "sanitizer": sanitizer,
    "graph": graph,
    "kernels": kernels,
    "train": train,
}


def details(stage: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a stage's own results come to."""
    if stage == "build":
        return {"nvcc": nvcc_version(), "torch": torch.__version__, "python": sys.version.split()[0]}
    rows_file = args.out / f"{stage}_rows.json"
    if stage in ("parity", "kernels", "graph") and rows_file.exists():
        content = read_json(rows_file)
        states: dict[str, int] = {}
        for row in content["rows"].values():
            state = row if isinstance(row, str) else row["status"]
            states[state] = states.get(state, 0) + 1
        return {"environment": content["environment"], "rows": states}
    return {}


def nvcc_version() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or next(
        (f"{home}/bin/nvcc" for home in homes if home and Path(home, "bin/nvcc").exists()), None
    )
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release \S+, (V\S+)", output)
    return found[1] if found else output.strip() or None
