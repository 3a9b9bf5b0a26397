"""Builds the module's CPU half under sanitizers: ``python tests/sanitized/build.py``; ``make sanitized`` does so and tests it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "sanitized"
MODULE = BUILD / "_C.so"


def build() -> None:
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    tools = Path(sys.executable).parent  # cmake and ninja of this environment, activated or not
    cmake = str(tools / "cmake") if (tools / "cmake").exists() else "cmake"
    make = [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"] if (tools / "ninja").exists() else []
    definitions = [f"-DTORCH_INCLUDES={';'.join(includes)}", f"-DTORCH_LIBRARIES={';'.join(cpp_extension.library_paths())}"]
    subprocess.run([cmake, "-S", HERE, "-B", BUILD, "-G", "Ninja", *make, *definitions], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", BUILD, "--parallel", "2"], check=True)


if __name__ == "__main__":
    build()
