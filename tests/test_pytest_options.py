"""The tests start where the plugins are absent that pyproject.toml names, as on a bare machine with a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="tests the source tree")


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    argv = ["-m", "pytest", "-o", "addopts=-ra", "-p", "no:cacheprovider", *options, "--collect-only", "-q"]
    return subprocess.run(
        [sys.executable, *argv, "tests/test_pytest_options.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_an_absent_plugin_is_a_warning() -> None:
    done = collect("-p", "no:timeout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PytestConfigWarning: Unknown config option: timeout" in done.stdout


def test_our_own_warnings_are_errors_all_the_same(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import warnings\ndef test_it(): warnings.warn('ours', UserWarning)\n")
    conftest = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "conftest"]
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=-ra",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:timeout",
        *conftest,
        str(test),
    ]
    done = subprocess.run(argv, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    assert "UserWarning: ours" in done.stdout
