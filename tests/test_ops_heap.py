"""Memory that PyTorch's own, unsanitized kernels overwrite is found by the C library's checks, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localsgd_ext import ops

CHECKER = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
SCRIPT = """
import torch
from localsgd_ext import ops
torch.set_num_threads(1)
for _ in range(20):
    x = torch.randn(2, 6, 10, 10).to(memory_format=torch.channels_last)
    weight = torch.randn(6, 6, 1, 1)
    z = torch.nn.functional.conv2d(x, weight, stride=2).to(memory_format=torch.channels_last)
    for algorithm in ("gram", "direct", "library"):
        ops.correlation(x, z, weight, stride=2, algorithm=algorithm)
print("intact")
"""


@pytest.mark.skipif(not ops.is_compiled() or ops._C.gpu == "cpu", reason="the CPU kernels are what is tested here")
@pytest.mark.skipif(not CHECKER.exists(), reason="glibc's checking allocator is not installed")
def test_strided_1x1_convolutions_in_channels_last_keep_to_their_memory() -> None:
    environment = {**os.environ, "LD_PRELOAD": str(CHECKER), "MALLOC_CHECK_": "3"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "intact\n"), done.stderr[-500:]
