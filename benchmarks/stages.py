"""The stages of gpu_suite.py: which commands each runs, what their exit statuses mean, and what of their results is told."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.targets import targets
from localsgd_ext.train.files import read_json

BENCHMARKS = Path(__file__).resolve().parent
SCRATCH = ROOT / "build" / "gpu_suite"
"""What is of no interest once its stage is over."""
SANITIZERS = ("memcheck", "initcheck", "synccheck", "racecheck")
FOUND = 9
"""What the sanitizer is told to return if it found something; Python and the script have other exit statuses."""
TRAIN = ("--data", "glyphs", "--methods", "sgd,freeze,refresh,local", "--seeds", "1", "--epochs", "4", "--train-size", "4000")
LEAST_SETUPTOOLS = 77
PARITY_JOBS = max(1, min(10, (os.cpu_count() or 1) - 2))
MOST_NAMED = 50  # rows at fault that the summary names
START = 20.0  # seconds that a script takes besides what its own --budget bounds: imports, the last row, tables


class Unavailable(Exception):
    """A stage cannot run here; says why."""


@dataclass(frozen=True)
class Request:
    """What a stage is asked for."""

    out: Path
    seconds: float
    """Until it is stopped."""
    device: str = "cuda"
    more: tuple[str, ...] = ()
    """Arguments for benchmarks/kernels.py."""

    def rows(self, stage: str) -> Path:
        return rows_file(self.out, stage)


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
    ours: str = ""
    """What is printed where exit status ``FOUND`` is about us; empty if it always is."""

    def status(self, rc: int | None, output: str = "") -> str:
        if rc is None:
            return "stopped"
        if rc == 0 or (rc == FOUND and self.ours and not re.search(self.ours, output, re.MULTILINE)):
            return "passed" if re.search(self.proof, output, re.MULTILINE) else "failed"
        if self.refusal(output):
            return "unavailable"
        return self.meanings.get(rc, "failed")

    def refusal(self, output: str) -> str:
        """The line by which the tool says that it does not work here, or ``""``."""
        found = re.search(self.refusals, output, re.MULTILINE | re.IGNORECASE) if self.refusals else None
        return found[0].strip("= ") if found else ""


def rows_file(out: Path, stage: str) -> Path:
    return out / f"{stage}_rows.json"


def python_path() -> dict[str, str]:
    """For a process that imports the source tree: before whatever the caller has."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def python(*argv: str) -> list[str]:
    return [sys.executable, *argv]


def script(name: str, *argv: str) -> list[str]:
    return python(str(BENCHMARKS / name), *argv)


def row_by_row(request: Request, stage: str) -> list[str]:
    """Options of a script that keeps its rows in a file, goes on with them, and ends by itself when its time is up."""
    path = request.rows(stage)
    budget = f"{max(1.0, request.seconds - START):.0f}"
    return ["--out", str(path), *(["--resume"] if path.exists() else []), "--budget", budget]


# ---- the stages --------------------------------------------------------------------------------------------------------


def build(_request: Request) -> list[Command]:
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        raise Unavailable("setuptools is not installed") from None
    if int(version.partition(".")[0]) < LEAST_SETUPTOOLS:
        raise Unavailable(f"setuptools is {version}, pyproject.toml needs {LEAST_SETUPTOOLS}: put a newer one on PYTHONPATH")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    environment = {"LOCALSGD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return [Command("build_ext", python("setup.py", "build_ext", "--inplace"), environment)]


def parity(request: Request) -> list[Command]:
    jobs = str(PARITY_JOBS if request.device == "cuda" else 1)
    argv = script("gpu_parity.py", "--device", request.device, "--jobs", jobs, *row_by_row(request, "parity"))
    return [Command("parity", argv, meanings={3: "stopped"})]


def pytest(_request: Request) -> list[Command]:
    """A process for each file: one that dies takes no other with it, and what has passed need not run again."""
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed")
    # The project's own options name plugins that a bare machine lacks; one test is the parity stage over again.
    options = ("-q", "-o", "addopts=-ra", "-p", "no:cacheprovider")
    repeated = "--deselect=tests/gpu/test_gpu_parity.py::test_agrees_with_fp64"
    return [
        Command(path.stem, python("-m", "pytest", *options, repeated, str(path.relative_to(ROOT))), python_path(), proof=r"\d passed")
        for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    ]  # fmt: skip


def graph(request: Request) -> list[Command]:
    return [Command("graph", script("gpu_graph.py", *row_by_row(request, "graph")), meanings={3: "stopped"})]


def kernels(request: Request) -> list[Command]:
    argv = script("kernels.py", "--device", "cuda", "--no-compile", *row_by_row(request, "kernels"), *request.more)
    return [Command("kernels", argv, meanings={3: "stopped"})]


def compiled(request: Request) -> list[Command]:
    """With what torch.compile makes of a user's code, which takes seconds a layer to compile: where the targets are."""
    layers = ("--dtypes", "bf16", "--layouts", "nhwc", *request.more)
    return [
        Command(
            "compiled",
            script("kernels.py", "--device", "cuda", *row_by_row(request, "compiled"), *layers),
            meanings={3: "stopped"},
        )
    ]


def sanitizer(_request: Request) -> list[Command]:
    """A command for each tool."""
    tool = find_sanitizer()
    if tool is None:
        raise Unavailable("compute-sanitizer is neither on PATH nor in CUDA_HOME or /usr/local/cuda")
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation each, so that overruns show
    # Other exit statuses say nothing: the tool hands on the script's own, and Python has 1 and 2 for what went wrong before its
    # first line. Only the tool's own words, behind its mark, that it cannot work here are no failure.
    refusals = r"^=+ .*(device (is )?not supported|unable to find injection library|insufficient (permissions|privileges)).*"
    # Kernels by a part of their mangled names; libraries' are none of our business. What initcheck does not look into it does not
    # see writing either, so there all are looked into, and what is found is ours if it is found in ours.
    only_ours = ["--kernel-name", "kns=localsgd"]
    special = {
        "memcheck": [*only_ours, "--report-api-errors", "no"],  # libraries ask for functions that a driver lacks
        "initcheck": ["--print-limit", "0"],
    }
    return [
        Command(
            kind,
            [tool, "--tool", kind, "--error-exitcode", str(FOUND), *special.get(kind, only_ours), *script("gpu_once.py")],
            environment,
            refusals=refusals,
            proof=r"^[1-9]\d* calls$",
            ours=r"^=+ +at .*\blocalsgd::" if kind == "initcheck" else "",
        )
        for kind in SANITIZERS
    ]


def step(request: Request) -> list[Command]:
    """Whole training steps; rows of dresses that take no compilation first."""
    return [Command("step", script("gpu_step.py", *row_by_row(request, "step")), meanings={3: "stopped"})]


def find_sanitizer() -> str | None:
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda") if home]
    places = [home / where / "compute-sanitizer" for home in homes for where in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(p) for p in places if p.is_file() and os.access(p, os.X_OK)), None)


def train(_request: Request) -> list[Command]:
    from localsgd_ext import __main__

    if missing := [name for name in __main__._NEEDED if importlib.util.find_spec(name) is None]:
        raise Unavailable(f"localsgd needs {', '.join(missing)}")
    argv = python("-m", "localsgd_ext", "compare", *TRAIN, "--device", "cuda", "--out", str(SCRATCH / "train"))
    if (SCRATCH / "train" / "compare.json").exists():
        argv.append("--resume")
    return [Command("compare", argv, python_path())]


STAGES: dict[str, Callable[[Request], list[Command]]] = {
    "build": build,
    "parity": parity,
    "pytest": pytest,
    "graph": graph,
    "kernels": kernels,
    "sanitizer": sanitizer,
    "step": step,
    "train": train,
    "compiled": compiled,
}
"""In the order in which they run: what is worth more first."""
TIMED = ("kernels", "compiled")
"""Those that take :attr:`Request.more`."""


def forget(out: Path, stage: str) -> None:
    """Remove what an earlier run of the stage has left."""
    rows_file(out, stage).unlink(missing_ok=True)
    if stage == "train":
        shutil.rmtree(SCRATCH / "train", ignore_errors=True)


def missing_on_gpu() -> str:
    """As :func:`benchmarks.gpu.missing` has it, from a process of its own: the module may just have been built."""
    command = script("gpu.py")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **python_path()}, capture_output=True, text=True, check=False)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"{command[-1]} ended with {done.returncode}"


# ---- what is told of their results -------------------------------------------------------------------------------------


def details(stage: str, out: Path) -> dict[str, Any]:
    """What a stage's own results come to."""
    if stage == "build":
        info = ROOT / "localsgd_ext" / "_build_info.json"
        return {"nvcc": nvcc_version(), "module": read_json(info) if info.exists() else None}
    table = SCRATCH / "train" / "table.json"
    if stage == "train":
        return {"table": read_json(table)} if table.exists() else {}
    if not rows_file(out, stage).exists():
        return {}
    content = read_json(rows_file(out, stage))
    rows = content["rows"]
    states: dict[str, int] = {}
    for row in rows.values():
        states[row["status"]] = states.get(row["status"], 0) + 1
    bad = {key: row.get("failed") or row.get("why") for key, row in rows.items() if row["status"] != "ok"}
    told = {"rows": states, "bad": dict(list(bad.items())[:MOST_NAMED])}
    return told | ({"targets": verdicts(list(rows.values()))} if stage in TIMED else {})


def verdicts(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By dtype and layout, over what has been timed so far."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault(f"{row['dtype']}, {row['layout']}", []).append(row)
    return {
        name: [{"target": v.target, "needed": v.needed, "reached": v.reached, "met": v.met} for v in found]
        for name, group in groups.items()
        if (found := targets(group, group[0]["dtype"], "cuda"))
    }


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
