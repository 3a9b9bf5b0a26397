"""Builds ``localsgd_ext._C`` from the files listed in ``csrc/sources.txt``; everything else is in ``pyproject.toml``.

Environment:
    LOCALSGD_CUDA         ``auto`` (default): the CUDA half where torch and nvcc allow it; ``1``: that or an error; ``0``: no.
    CUDA_HOME             the toolkit; without it nvcc is looked for on PATH, in /usr/local/cuda and in PyPI's toolkit wheels.
    TORCH_CUDA_ARCH_LIST  defaults to the visible GPUs' architectures, and to "7.5;8.0;9.0+PTX" where there is no GPU.
    MAX_JOBS              compiler processes at once; defaults to what cores and memory allow.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

ROOT = Path(__file__).resolve().parent
GROUPS = ("core", "torch", "cuda", "glue")
DEFAULT_ARCH_LIST = "7.5;8.0;9.0+PTX"
BYTES_PER_JOB = 3 << 30  # a translation unit that includes ATen takes up to 3 GiB


def load(path):
    """Import one file of the package without importing the package, which needs the module that is to be built."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolkits = load(ROOT / "localsgd_ext" / "_cuda_toolkit.py")


def read_sources(root=ROOT):
    """``{group: [path, ...]}`` from csrc/sources.txt, whose lines are ``<group> <path>``; ``#`` starts a comment."""
    sources = {group: [] for group in GROUPS}
    for number, line in enumerate((root / "csrc" / "sources.txt").read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in GROUPS:
            raise SystemExit(f"csrc/sources.txt:{number}: expected '<{'|'.join(GROUPS)}> <path>', got {line!r}")
        if not (root / words[1]).is_file():
            raise SystemExit(f"csrc/sources.txt:{number}: {words[1]} does not exist")
        sources[words[0]].append(words[1])
    return sources


def choose_toolkit(cuda_sources, choice, torch_cuda):
    """``(toolkit, "")`` to build the CUDA half, or ``(None, why not)``, empty where the user did not want it."""
    choice = choice or "auto"
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"LOCALSGD_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return None, ""
    toolkit, problem = None, ""
    if torch_cuda is None:
        problem = f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    else:
        try:
            toolkit = toolkits.find_toolkit(torch_cuda)
        except toolkits.ToolkitError as error:
            problem = str(error)
    if problem and choice == "1":
        raise SystemExit(f"LOCALSGD_CUDA=1, but CUDA kernels cannot be built: {problem}")
    if not cuda_sources:
        return None, "this version has no CUDA sources: building the CPU kernels only"
    return toolkit, f"building without CUDA kernels: {problem}" if problem else ""


def set_environment(toolkit):
    """Set what torch.utils.cpp_extension reads, in part while it is imported."""
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


def make_extension(cpp_extension, sources, toolkit):
    """The compiled module, with the CUDA half if there is a toolkit."""
    # -g0 undoes the interpreter's own -g, which would make the module ten times as large.
    cxx = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {"cxx": cxx},
        "extra_link_args": ["-fopenmp"],
    }
    host_sources = sources["core"] + sources["torch"]
    if toolkit is None:
        return cpp_extension.CppExtension("localsgd_ext._C", host_sources, **options)
    cxx.append("-DLOCALSGD_WITH_CUDA")
    options["extra_compile_args"]["nvcc"] = ["-O3", "-std=c++20", "-lineinfo", "-DLOCALSGD_WITH_CUDA"]
    extension = cpp_extension.CUDAExtension("localsgd_ext._C", host_sources + sources["glue"] + sources["cuda"], **options)
    extension.include_dirs.append(str(toolkit.include))
    extension.libraries.remove("cudart")  # by path instead: the wheels have no libcudart.so for -lcudart to find
    extension.extra_objects.append(str(toolkit.cudart))
    return extension


def build_info(cpp_extension, toolkit):
    """What ``localsgd doctor`` tells about the build; every value is a string, empty where it does not apply."""

    def output(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    compiler = cpp_extension.get_cxx_compiler()
    commit = output("git", "rev-parse", "--short=12", "HEAD") if (ROOT / ".git").exists() else ""
    changed = "+changes" if commit and output("git", "status", "--porcelain", "--", "csrc", "setup.py") else ""
    targets = {flag.rpartition("code=")[2] for flag in cpp_extension._get_cuda_arch_flags()} if toolkit else set()
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
        "compiler": (output(compiler, "--version").splitlines() or [compiler])[0],
        "git_commit": commit + changed,
        "nvcc": toolkit.version if toolkit else "",
        "cuda_arch_list": " ".join(sorted(targets)),
    }


@contextlib.contextmanager
def one_at_a_time(path):
    """Waits for other builds with the lock file ``path``: two ninjas in one directory forget what depends on which header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("localsgd_ext: waiting for another build in this directory", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                print(f"localsgd_ext: {path} cannot be locked ({error}); let no two builds run here at once", file=sys.stderr)
        yield


def make_build_command(cpp_extension, toolkit, remark):
    """torch's build_ext, with objects kept between builds, and ``_build_info.json`` written beside the module."""

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # An editable install builds in a directory that pip throws away: every edit would compile everything again.
            self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}-{'cuda' if toolkit else 'cpu'}")

        def build_extensions(self):
            if remark:
                print(f"localsgd_ext: {remark}", file=sys.stderr, flush=True)
            with one_at_a_time(Path(self.build_temp).with_suffix(".lock")):
                super().build_extensions()
            self.info_file = Path(self.get_ext_fullpath("localsgd_ext._C")).with_name("_build_info.json")
            self.info_file.write_text(json.dumps(build_info(cpp_extension, toolkit), indent=2) + "\n")

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            shutil.copyfile(self.info_file, ROOT / "localsgd_ext" / self.info_file.name)

    return BuildExtension


def main():
    sources = read_sources()
    toolkit, remark = choose_toolkit(sources["cuda"], os.environ.get("LOCALSGD_CUDA"), torch.version.cuda)
    set_environment(toolkit)
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.setLevel(logging.ERROR)  # its "No CUDA runtime is found" only means that this machine has no GPU
    from torch.utils import cpp_extension  # not before: it reads CUDA_HOME when it is imported

    logger.setLevel(logging.NOTSET)
    setup(
        ext_modules=[make_extension(cpp_extension, sources, toolkit)],
        cmdclass={"build_ext": make_build_command(cpp_extension, toolkit, remark)},
    )


if __name__ == "__main__":
    main()
