"""What every test starts from: fixed seeds, one compute thread, no TF32, our own warnings as errors.

With ``--emulated`` the operations run the CUDA kernels on an emulated GPU, on tensors of the CPU.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import fuzz_coverage
import numpy as np
import pytest
import torch
from second_build import SANITIZED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated", action="store_true", help="run the CUDA kernels that `make emulated` builds, on an emulated GPU"
    )
    parser.addoption("--sanitized", action="store_true", help="run the module that `make sanitized` builds, under sanitizers")
    parser.addoption("--soak", action="store_true", help="repeat what `make soak` repeats as often as it does")
    parser.addoption("--fuzz-share", type=float, default=1.0, help="of the random layers of tests/test_ops_fuzz.py to try")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitized"):
        if "libasan" not in Path("/proc/self/maps").read_text():
            raise SystemExit("--sanitized needs the sanitizers' runtime in LD_PRELOAD: run the tests with `make sanitized`")
        SANITIZED.install()
    if config.getoption("--emulated"):
        from emulated import gpu

        gpu.install()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        fuzz_coverage.forget()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: same bits as in this one
    config.addinivalue_line("markers", "slow: builds something; deselect with -m 'not slow'")
    # The package warns by UserWarning: one that a test does not expect (pytest.warns) is a failure.
    config.addinivalue_line("filterwarnings", "error::UserWarning")
    # Pytest's own are UserWarnings too: where a plugin is absent, its option in pyproject.toml is unknown and no error.
    config.addinivalue_line("filterwarnings", "default::pytest.PytestConfigWarning")
    # Of PyTorch 2.9 to 2.11, about the flags by which the tests turn TF32 off.
    config.addinivalue_line("filterwarnings", "ignore:Please use the new API settings to control TF32:UserWarning")
    # Source trees without a compiled module are supported; tests/test_doctor.py checks what is said there.
    config.addinivalue_line("filterwarnings", "default:localsgd_ext runs on its plain PyTorch reference:RuntimeWarning")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "emulated" and not config.getoption("--emulated") else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--emulated"):
        from emulated import gpu

        for line in gpu.coverage_lines():
            terminalreporter.write_line(line)
    for line in fuzz_coverage.lines():
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what third-party code still reads)
    torch.manual_seed(0)
    # The order of a float sum depends on the thread count; several test processes share the cores.
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.fixture
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether to repeat things for as long as ``make soak`` does."""
    return bool(pytestconfig.getoption("--soak"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of how work is split among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` and its C++ twin hold NaN (integers: the largest value), so that reading before writing shows."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialized memory is filled in this mode only
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
