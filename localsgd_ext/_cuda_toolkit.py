"""Finds a CUDA toolkit to compile with. Standard library only: ``setup.py`` loads this file before the package exists."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


class ToolkitError(RuntimeError):
    """No usable toolkit; the message says what was looked at and what was wrong with it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile for the installed PyTorch.

    ``home`` holds ``bin/nvcc``, ``include`` holds ``cuda_runtime.h``, ``version`` is nvcc's, as in ``"13.0"``. ``cudart`` is
    the runtime library, by full path because PyPI's wheels carry only ``libcudart.so.<major>``, which ``-lcudart`` misses.
    """

    home: Path
    include: Path
    cudart: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def install_hint(torch_cuda: str) -> str:
    """How to add nvcc to an environment whose PyTorch was built with CUDA ``torch_cuda`` (as in ``"13.0"``)."""
    if int(torch_cuda.split(".")[0]) >= 13:
        return f'pip install "cuda-toolkit[nvcc,cccl,cudart]=={torch_cuda}.*"'
    # The wheels named *-cu12 hold ptxas but no nvcc, so PyPI cannot help here.
    return f"install the CUDA {torch_cuda} toolkit of your system and set CUDA_HOME to it"


def find_toolkit(
    torch_cuda: str,
    *,
    environ: Mapping[str, str] = os.environ,
    site_dirs: Iterable[Path] | None = None,
    default_homes: Iterable[Path] = (Path("/usr/local/cuda"),),
) -> Toolkit:
    """Return the first usable toolkit of ``CUDA_HOME`` (or ``CUDA_PATH``), nvcc on ``PATH``, ``/usr/local/cuda``, PyPI wheels.

    ``torch_cuda`` is ``torch.version.cuda``; nvcc must have the same major version, because one process cannot hold the
    runtimes of two. An explicit ``CUDA_HOME`` is taken or refused, never passed over in silence.

    Raises:
        ToolkitError: nothing usable; one line per place looked at, then the command that would help.
    """
    site_dirs = _site_dirs() if site_dirs is None else [Path(d) for d in site_dirs]
    problems: list[str] = []
    for origin, home in _candidates(environ, site_dirs, default_homes):
        try:
            return _inspect(home, torch_cuda, site_dirs)
        except ToolkitError as error:
            problems.append(f"{origin}: {error}")
    found = "; ".join(problems) or "no nvcc in CUDA_HOME, on PATH, in /usr/local/cuda or in the nvidia wheels beside torch"
    raise ToolkitError(f"{found}. To get one: {install_hint(torch_cuda)}")


def _site_dirs() -> list[Path]:
    return [Path(d) for d in dict.fromkeys([*sys.path, *site.getsitepackages()]) if d and (Path(d) / "nvidia").is_dir()]


def _candidates(
    environ: Mapping[str, str], site_dirs: Iterable[Path], default_homes: Iterable[Path]
) -> Iterator[tuple[str, Path]]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield f"{name}={environ[name]}", Path(environ[name])
            return
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        # Unresolved first (a toolkit's own bin/), then through links (Debian's alternatives).
        homes = [Path(on_path).absolute().parent.parent, Path(on_path).resolve().parent.parent]
        yield from ((f"nvcc on PATH ({on_path})", home) for home in dict.fromkeys(homes))
    yield from ((str(home), home) for home in default_homes if home.is_dir())
    for directory in site_dirs:
        homes = sorted((directory / "nvidia").glob("cu[0-9]*"), reverse=True)
        yield from ((f"wheels in {home}", home) for home in homes if (home / "bin" / "nvcc").exists())


def _inspect(home: Path, torch_cuda: str, site_dirs: Iterable[Path]) -> Toolkit:
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        raise ToolkitError("there is no bin/nvcc")
    version = nvcc_version(nvcc)
    major = torch_cuda.split(".")[0]
    if version.split(".")[0] != major:
        raise ToolkitError(f"its nvcc is {version}, but torch was built with CUDA {torch_cuda}: the major versions must agree")
    includes = [home / "include", *sorted(home.glob("targets/*/include"))]
    include = next((d for d in includes if (d / "cuda_runtime.h").is_file()), None)
    if include is None:
        raise ToolkitError("there is no include/cuda_runtime.h (package cudart)")
    for header, package in (("crt/host_config.h", "crt"), ("nv/target", "cccl")):
        if not any((d / header).is_file() for d in (include, include / "cccl")):
            raise ToolkitError(f"there is no include/{header} (package {package})")
    if not any((d / "cicc").is_file() for d in (home / "nvvm" / "bin", home / "bin")):
        raise ToolkitError("there is no nvvm/bin/cicc (package nvvm)")
    return Toolkit(home, include, _cudart(home, include, major, site_dirs), version)


def nvcc_version(nvcc: Path) -> str:
    """``"13.0"`` for an nvcc of release 13.0. Raises ToolkitError if it cannot be run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolkitError(f"{nvcc} does not run ({error})") from error
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise ToolkitError(f"{nvcc} --version names no release")
    return match[1]


def _cudart(home: Path, include: Path, major: str, site_dirs: Iterable[Path]) -> Path:
    dirs = [home / "lib64", home / "lib", include.parent / "lib"]
    dirs += [d / "nvidia" / sub / "lib" for d in site_dirs for sub in (f"cu{major}", "cuda_runtime")]
    for directory in dirs:
        for name in ("libcudart.so", f"libcudart.so.{major}", f"libcudart.so.{major}.0"):
            if (directory / name).is_file():
                return directory / name
    raise ToolkitError(f"there is no libcudart.so.{major} (package cudart)")
