"""Another build of the compiled module, by a CMakeLists.txt under ``tests/``, and its use in place of the usual one.

``python tests/second_build.py emulated`` (or ``sanitized``) builds it; ``make test`` does so first.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class SecondBuild:
    name: str
    """Of the directory under ``tests/`` that holds the CMakeLists.txt."""

    @property
    def directory(self) -> Path:
        return HERE.parent / "build" / self.name

    @property
    def module(self) -> Path:
        return self.directory / "_C.so"

    def build(self) -> None:
        from torch.utils import cpp_extension

        includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        tools = Path(sys.executable).parent  # cmake and ninja of this environment, activated or not
        cmake = str(tools / "cmake") if (tools / "cmake").exists() else "cmake"
        make = [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"] if (tools / "ninja").exists() else []
        where = [f"-DTORCH_INCLUDES={';'.join(includes)}", f"-DTORCH_LIBRARIES={';'.join(cpp_extension.library_paths())}"]
        configure = [cmake, "-S", HERE / self.name, "-B", self.directory, "-G", "Ninja", *make, *where]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([cmake, "--build", self.directory, "--parallel", "2"], check=True)

    def install(self) -> None:
        """Make ``localsgd_ext`` import this build."""
        if not self.module.exists():
            raise SystemExit(f"{self.module} is missing: build it with `python tests/second_build.py {self.name}`")
        spec = importlib.util.spec_from_file_location("localsgd_ext._C", self.module)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["localsgd_ext._C"] = module
        spec.loader.exec_module(module)


EMULATED = SecondBuild("emulated")
SANITIZED = SecondBuild("sanitized")

if __name__ == "__main__":
    SecondBuild(*sys.argv[1:]).build()
