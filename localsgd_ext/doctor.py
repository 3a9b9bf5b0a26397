"""``localsgd doctor``: what is installed and compiled, whether it computes what it should, and how to get what is missing.

Needs PyTorch only: it runs where the command line's packages or the compiled module are what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # a missing module is reported below, in more words
    from localsgd_ext import ops, reference

from localsgd_ext import _cuda_toolkit
from localsgd_ext._precision import tf32

PACKAGE = Path(__file__).resolve().parent


@dataclass
class Report:
    """Prints as it goes; keeps what failed and what the user could do."""

    failures: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def line(self, name: str, value: str) -> None:
        print(f"  {name:<14} {value}")


def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns 0, or 1 if a self-test failed."""
    argparse.ArgumentParser(prog="localsgd doctor", description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    report = Report()
    print(f"localsgd_ext {_version('localsgd_ext') or '(source tree, not installed)'}")
    report_environment(report)
    report_compiled_module(report)
    report_gpu(report)
    report_self_test(report)
    report_extras(report)
    if report.advice:
        report.section("What could be better")
        for text in report.advice:
            print(f"  * {text}")
    print()
    for failure in report.failures:
        print(f"FAILED: {failure}")
    print("Some checks FAILED." if report.failures else "Everything that is here works.")
    return 1 if report.failures else 0


# ---- what is here ------------------------------------------------------------------------------------------------------


def report_environment(report: Report) -> None:
    report.section("Environment")
    report.line("Python", f"{platform.python_version()} ({sys.executable})")
    report.line(
        "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    )
    report.line(
        "PyTorch", f"{torch.__version__}, built {f'with CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"
    )
    compiler = os.environ.get("CXX", "c++")
    version = _first_line(compiler, "--version")
    report.line("C++ compiler", version or "none")
    if not version:
        report.advice.append(
            "No C++ compiler: needed only to build. Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`."
        )
    if torch.version.cuda is None:
        report.line("nvcc", "not of use: PyTorch was built without CUDA")
        return
    try:
        toolkit = _cuda_toolkit.find_toolkit(torch.version.cuda)
        report.line("nvcc", f"{toolkit.version} ({toolkit.home})")
    except _cuda_toolkit.ToolkitError as error:
        report.line("nvcc", "none that fits")
        report.advice.append(f"CUDA kernels cannot be built here: {error}.")


def report_compiled_module(report: Report) -> None:
    report.section("Compiled module")
    module = next(PACKAGE.glob("_C.*.so"), None)
    if not ops.is_compiled():
        report.line("_C", "not loaded: the operations run on the plain PyTorch reference, which is slower")
        found = f"{module.name} is there but does not load: {_import_error()}." if module else "The compiled module is missing."
        report.advice.append(
            f"{found} Build it in the source tree: `pip install --no-build-isolation .` (needs a C++ compiler)."
        )
        return
    info = build_info()
    report.line("_C", f"loaded ({module or 'built in'})")
    if not info:
        report.line("built with", "unknown: _build_info.json is missing")
        return
    commit = f", commit {info['git_commit']}" if info["git_commit"] else ""
    report.line("built with", f"torch {info['torch']}, {info['compiler']}{commit}")
    if info["torch"] != torch.__version__:
        report.advice.append(
            f"The compiled module was built with torch {info['torch']} but runs with {torch.__version__}: "
            "rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`."
        )
    report.line("CPU kernels", "compiled (C++, OpenMP)")
    if not info["cuda_arch_list"]:
        report.line("CUDA kernels", "none compiled in: on a GPU the operations run on the plain PyTorch reference")
        return
    report.line("CUDA kernels", f"for {info['cuda_arch_list']} (nvcc {info['nvcc']})")
    for kernel, architectures in sorted(compiled_kernels(module).items()) if module else []:
        report.line("", f"{kernel}: {' '.join(architectures)}")


def build_info() -> dict[str, str]:
    """What ``setup.py`` wrote beside the module: torch, torch_cuda, python, compiler, git_commit, nvcc, cuda_arch_list; or {}."""
    try:
        return dict(json.loads((PACKAGE / "_build_info.json").read_text()))
    except FileNotFoundError:
        return {}


def compiled_kernels(module: Path) -> dict[str, list[str]]:
    """``{kernel: [sm_75, ...]}`` as cuobjdump lists them; empty if there is no cuobjdump (the toolkit or triton brings it)."""
    cuobjdump = shutil.which("cuobjdump")
    spec = util.find_spec("triton")
    if cuobjdump is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        cuobjdump = str(bundled) if bundled.exists() else None
    if cuobjdump is None:
        return {}
    listing = subprocess.run([cuobjdump, "-res-usage", str(module)], capture_output=True, text=True, check=False)
    kernels: dict[str, list[str]] = {}
    architecture = ""
    for line in (listing.stdout + listing.stderr).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\w+):", line.strip()):
            found = kernels.setdefault(_demangled(match[1]), [])
            if architecture not in found:
                found.append(architecture)
    return kernels


def report_gpu(report: Report) -> None:
    report.section("GPU")
    if not torch.cuda.is_available():
        report.line("visible", "none: training runs on the CPU")
        return
    compiled = build_info().get("cuda_arch_list", "").split()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        report.line(f"cuda:{index}", f"{name}, sm_{major}{minor}")
        if compiled and not covers(compiled, major, minor):
            report.advice.append(
                f"No kernel is compiled for cuda:{index} ({name}, sm_{major}{minor}), only for {' '.join(compiled)}: "
                f'rebuild with TORCH_CUDA_ARCH_LIST="{major}.{minor}".'
            )


def covers(compiled: list[str], major: int, minor: int) -> bool:
    """Whether a GPU of compute capability ``major.minor`` runs one of ``compiled`` (``sm_80``, ``compute_90``, ...)."""
    capability = 10 * major + minor
    for entry in compiled:
        match = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", entry)
        if match is None:
            continue
        kind, target, suffix = match[1], int(match[2]), match[3]
        if suffix:  # sm_90a and the like run on exactly that architecture
            if target == capability:
                return True
        elif kind == "compute":  # PTX: the driver compiles it for anything newer
            if target <= capability:
                return True
        elif target // 10 == major and target <= capability:
            return True
    return False


_SOME_NEED = {
    "torch-pruning": "`localsgd train --method prunetrain` needs",
    "tensorboard": "Curves of a run for TensorBoard need",
}


def report_extras(report: Report) -> None:
    report.section("Packages of the command line (extra [train])")
    try:
        requires = metadata.requires("localsgd_ext") or []
    except metadata.PackageNotFoundError:
        report.line("unknown", "localsgd_ext itself is not installed")
        report.advice.append("The package is not installed: `pip install --no-build-isolation -e .` in the source tree.")
        return
    names = [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in requires if re.search(r"extra == ['\"]train['\"]", text)]
    missing = [name for name in names if not _version(name)]
    for name in names:
        report.line(name, _version(name) or "missing")
    install = '`pip install "localsgd_ext[train]"`'
    if needed := [name for name in missing if name not in _SOME_NEED]:
        report.advice.append(f"`localsgd train` and `compare` need {', '.join(needed)}: {install}.")
    report.advice += [f"{_SOME_NEED[name]} {name}: {install}." for name in missing if name in _SOME_NEED]


# ---- self-test ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer: ``algorithms`` are those that must work on it; ``x`` and ``weight`` are shapes, ``geometry`` keyword arguments."""

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    algorithms: tuple[str, ...]
    geometry: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("conv2d 3x3", (3, 6, 9, 7), (5, 6, 3, 3), ("auto", "direct", "library"), {"stride": 2, "padding": 1}),
    Case("conv2d 3x3, stride 1", (3, 6, 9, 7), (5, 6, 3, 3), ("auto", "direct", "winograd", "library"), {"padding": 1}),
    Case("conv2d grouped", (2, 6, 8, 9), (4, 3, 3, 2), ("auto", "direct", "library"), {"groups": 2, "dilation": 2}),
    Case("conv2d 1x1", (3, 8, 5, 7), (12, 8, 1, 1), ("auto", "gram", "direct", "library")),
    Case("conv2d depthwise", (3, 6, 9, 7), (6, 1, 3, 3), ("auto", "depthwise", "library"), {"groups": 6, "padding": 1}),
    Case("conv1d", (3, 4, 17), (5, 4, 3), ("auto", "direct", "library")),
    Case("conv3d", (2, 3, 5, 6, 4), (4, 3, 2, 3, 2), ("auto", "direct", "library")),
    Case("linear", (4, 3, 8), (12, 8), ("auto", "gram", "library")),
)
DTYPES = (torch.float32, torch.bfloat16)  # of the activations; the weights are fp32


def tolerance(algorithm: str, dtype_name: str) -> float:
    """fp32 accumulation everywhere; PyTorch's own bf16 weight gradient (``library``, and so ``auto``) is rounded at its end."""
    return 1e-2 if dtype_name == "bfloat16" and algorithm in ("library", "auto", "") else 1e-5


def report_self_test(report: Report) -> None:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    with tf32(False):
        for device in devices:
            what = "compiled kernels" if ops.is_compiled(device) else "PyTorch reference"
            report.section(f"Self-test on {device} ({what}): worst relative error against the fp64 reference")
            _self_test_device(report, device)


def _self_test_device(report: Report, device: str) -> None:
    rows: dict[tuple[str, str, str], list[float]] = {}
    for dtype in DTYPES:
        for op, algorithm, case, check in _checks(device, dtype):
            title = f"{op} {algorithm}".strip()
            try:
                error = check()
            except Exception as problem:  # the report goes on: which others work is what the reader wants to know
                report.failures.append(
                    f"{title} on {case.name}, {_short(dtype)}, {device}: {type(problem).__name__}: {problem}"
                )
                error = float("inf")
            if not error <= tolerance(algorithm, _short(dtype)):  # NaN fails too
                report.failures.append(f"{title} on {case.name}, {_short(dtype)}, {device}: error {error:.1e}")
            rows.setdefault((title, algorithm, _short(dtype)), []).append(error)
    for (title, algorithm, dtype_name), errors in rows.items():
        worst = float("nan") if any(e != e for e in errors) else max(errors)
        plural = " " if len(errors) == 1 else "s"
        verdict = "ok" if worst <= tolerance(algorithm, dtype_name) else "FAILED"
        print(f"  {title:<27} {dtype_name:<9} {len(errors)} shape{plural}  {worst:.1e}  {verdict}")


def _checks(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str, Case, Callable[[], float]]]:
    for algorithm in reference.ALGORITHMS:
        for case in CASES:
            only_a_cpu_has_it = algorithm == "winograd" and ops.is_compiled(device)
            if algorithm in case.algorithms and not (only_a_cpu_has_it and device != "cpu"):
                yield "correlation", algorithm, case, partial(_correlation_error, case, algorithm, device, dtype)
    for case in CASES:
        yield "hebbian_update_", "", case, partial(_update_error, case, device, dtype)
    for case in CASES:
        yield "hebbian_update_ (zero norm)", "", case, partial(_skip_error, case, device, dtype)
    for case in CASES:
        yield "apply_update_", "", case, partial(_apply_error, case, device)


def _operands(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z, weight, bias; ``z`` is the layer's output in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.x, generator=generator).to(device, dtype)
    weight = torch.randn(case.weight, generator=generator).to(device) / 4
    bias = torch.randn(case.weight[0], generator=generator).to(device) / 4
    layer = F.linear if len(case.weight) == 2 else (F.conv1d, F.conv2d, F.conv3d)[len(case.weight) - 3]
    return x, layer(x, weight.to(dtype), bias.to(dtype), **case.geometry), weight, bias


def _correlation_error(case: Case, algorithm: str, device: str, dtype: torch.dtype) -> float:
    x, z, weight, bias = _operands(case, device, dtype)
    d = ops.correlation(x, z, weight, bias=bias, algorithm=algorithm, **case.geometry)
    # The Gram form reads the weight, as the forward rounded it, and not z.
    w, b = (weight.to(dtype), bias.to(dtype)) if algorithm == "gram" else (weight, bias)
    operands = x.double(), None if algorithm == "gram" else z.double(), w.double()
    return _error(d, reference.correlation(*operands, bias=b.double(), **case.geometry))


def _update_error(case: Case, device: str, dtype: torch.dtype) -> float:
    """Error of the step, not of the weight, in which a wrong step of usual size would drown."""
    x, z, weight, bias = _operands(case, device, dtype)
    before, expected = weight.double(), weight.double()
    ops.hebbian_update_(weight, x, z, 1.0, bias=bias, **case.geometry)
    reference.hebbian_update_(expected, x.double(), z.double(), 1.0, bias=bias.double(), **case.geometry)
    return _error(weight.double() - before, expected - before)


def _skip_error(case: Case, device: str, dtype: torch.dtype) -> float:
    """0 if an update of norm zero leaves the weight alone and is counted, else infinity."""
    x, z, weight, bias = _operands(case, device, dtype)
    before, skipped = weight.clone(), torch.zeros(1, dtype=torch.int64, device=device)
    ops.hebbian_update_(weight, x, torch.zeros_like(z), 1.0, bias=bias, skipped=skipped, **case.geometry)
    return 0.0 if torch.equal(weight, before) and skipped.item() == 1 else float("inf")


def _apply_error(case: Case, device: str) -> float:
    _, _, weight, _ = _operands(case, device, torch.float32)
    before, expected, d = weight.double(), weight.double(), weight.flip(0).contiguous()
    ops.apply_update_([weight], [d], -1.0)
    reference.apply_update_([expected], [d.double()], -1.0)
    return _error(weight.double() - before, expected - before)


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


# ---- small things ------------------------------------------------------------------------------------------------------


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def _demangled(symbol: str) -> str:
    return _first_line("c++filt", "-p", symbol) or symbol


def _import_error() -> str:
    try:
        __import__("localsgd_ext._C")
    except ImportError as error:
        return str(error)
    return "it loads now"


if __name__ == "__main__":
    sys.exit(main())
