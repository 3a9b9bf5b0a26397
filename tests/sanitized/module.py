"""The module compiled with sanitizers, in place of the usual one. Its runtime libraries have to be loaded before Python itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from sanitized.build import MODULE


def install() -> None:
    """Make ``localsgd_ext`` import the sanitized module."""
    if not MODULE.exists():
        raise SystemExit(f"{MODULE} is missing: build it with `python tests/sanitized/build.py`")
    if "libasan" not in Path("/proc/self/maps").read_text():
        raise SystemExit("--sanitized needs the sanitizers' runtime in LD_PRELOAD: run the tests with `make sanitized`")
    spec = importlib.util.spec_from_file_location("localsgd_ext._C", MODULE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["localsgd_ext._C"] = module
    spec.loader.exec_module(module)
