"""Builds ``localsgd_ext._C`` from the files listed in ``csrc/sources.txt``; everything else is in ``pyproject.toml``.

Environment:
    LOCALSGD_CUDA         ``auto`` (default): the CUDA half where torch and nvcc allow it; ``1``: that or an error; ``0``: no.
    CUDA_HOME             the toolkit; without it nvcc is looked for on PATH, in /usr/local/cuda and in PyPI's toolkit wheels.
    TORCH_CUDA_ARCH_LIST  defaults to the visible GPUs' architectures, and to "7.5;8.0;9.0+PTX" where there is no GPU.
    MAX_JOBS              compiler processes at once; defaults to what cores and memory allow.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCH_LIST = "7.5;8.0;9.0+PTX"
GROUPS = ("core", "torch", "cuda")
BYTES_PER_JOB = 3 << 30  # a translation unit that includes ATen takes up to 3 GiB


def load(path):
    """Import one file of the package without importing the package, which needs the module that is to be built."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolkits = load(ROOT / "localsgd_ext" / "_cuda_toolkit.py")


def read_sources():
    """``{group: [path, ...]}`` from csrc/sources.txt, whose lines are ``<group> <path>``; ``#`` starts a comment."""
    sources = {group: [] for group in GROUPS}
    for number, line in enumerate((ROOT / "csrc" / "sources.txt").read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in GROUPS:
            raise SystemExit(f"csrc/sources.txt:{number}: expected '<{'|'.join(GROUPS)}> <path>', got {line!r}")
        if not (ROOT / words[1]).is_file():
            raise SystemExit(f"csrc/sources.txt:{number}: {words[1]} does not exist")
        sources[words[0]].append(words[1])
    return sources


def choose_toolkit(cuda_sources):
    """The toolkit for the CUDA half, or None (with one line that says why) to build without it."""
    choice = os.environ.get("LOCALSGD_CUDA", "auto") or "auto"
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"LOCALSGD_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return None
    toolkit, reason = None, None
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    else:
        try:
            toolkit = toolkits.find_toolkit(torch.version.cuda)
        except toolkits.ToolkitError as error:
            reason = str(error)
    if reason and choice == "1":
        raise SystemExit(f"LOCALSGD_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    if reason and cuda_sources:
        notice(f"building without CUDA kernels: {reason}")
    if toolkit and not cuda_sources:
        notice(f"nvcc {toolkit.version} is usable, but this version has no CUDA sources: building the CPU kernels only")
        return None
    return toolkit


def notice(text):
    print(f"localsgd_ext: {text}", file=sys.stderr, flush=True)


def default_environment(toolkit):
    """Set what torch.utils.cpp_extension reads, some of it while it is imported."""
    if importlib.util.find_spec("ninja"):  # pip puts its environment's bin/ on PATH only where the environment is activated
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            os.environ["TORCH_CUDA_ARCH_LIST"] = DEFAULT_ARCH_LIST
    if not os.environ.get("MAX_JOBS"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        os.environ["MAX_JOBS"] = str(max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB)))


SOURCES = read_sources()
TOOLKIT = choose_toolkit(SOURCES["cuda"])
default_environment(TOOLKIT)

from torch.utils import cpp_extension  # noqa: E402  (reads CUDA_HOME at import)


def make_extension():
    sources = SOURCES["core"] + SOURCES["torch"]
    headers = [str(p.relative_to(ROOT)) for suffix in ("h", "hpp", "cuh") for p in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))]
    cxx = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {"cxx": cxx},
        "extra_link_args": ["-fopenmp"],
        "depends": [*headers, "csrc/sources.txt", "setup.py"],
    }
    if TOOLKIT is None:
        return cpp_extension.CppExtension("localsgd_ext._C", sources, **options)
    cxx.append("-DLOCALSGD_WITH_CUDA")
    options["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "-lineinfo", "--threads=1", "-DLOCALSGD_WITH_CUDA"]
    extension = cpp_extension.CUDAExtension("localsgd_ext._C", sources + SOURCES["cuda"], **options)
    extension.include_dirs.append(str(TOOLKIT.include))
    extension.libraries.remove("cudart")  # by path instead: the wheels have no libcudart.so for -lcudart to find
    extension.extra_objects.append(str(TOOLKIT.cudart))
    return extension


def build_info():
    """What `localsgd doctor` tells about the build; every value is a string."""

    def output(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    compiler = cpp_extension.get_cxx_compiler()
    commit = output("git", "rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else ""
    dirty = "+changes" if commit and output("git", "status", "--porcelain", "--", "csrc", "setup.py") else ""
    info = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
        "compiler": (output(compiler, "--version").splitlines() or [compiler])[0],
        "git_commit": commit + dirty,
        "nvcc": "",
        "cuda_arch_list": "",
    }
    if TOOLKIT is not None:
        info["nvcc"] = TOOLKIT.version
        flags = cpp_extension._get_cuda_arch_flags()
        info["cuda_arch_list"] = " ".join(sorted({flag.rpartition("code=")[2] for flag in flags}))
    return info


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with objects kept between builds, and ``_build_info.json`` written beside the module."""

    def finalize_options(self):
        super().finalize_options()
        # An editable install builds in a directory that pip throws away; there, every edit would compile everything again.
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}-{'cuda' if TOOLKIT else 'cpu'}")

    def build_extensions(self):
        super().build_extensions()
        self.info_file = Path(self.get_ext_fullpath("localsgd_ext._C")).with_name("_build_info.json")
        self.info_file.write_text(json.dumps(build_info(), indent=2) + "\n")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        shutil.copyfile(self.info_file, ROOT / "localsgd_ext" / "_build_info.json")


setup(ext_modules=[make_extension()], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
