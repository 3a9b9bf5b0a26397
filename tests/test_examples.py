"""The examples run as they stand, with settings small enough for a test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"epoch +(\d+)  loss (\S+)  local layers +(\d+) of (\d+)  ")


@pytest.mark.parametrize(("script", "layers"), [("resnet18_plain_loop.py", 21), ("transformers_resnet.py", 26)])
def test_example(script, layers):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), "--epochs", "6", "--images", "64", "--size", "32"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [LINE.match(line).groups() for line in done.stdout.splitlines()]
    assert [int(epoch) for epoch, *_ in lines] == list(range(6))
    assert {int(total) for *_, total in lines} == {layers}
    boundaries = [int(boundary) for _, _, boundary, _ in lines]
    assert boundaries[0] == 0
    assert boundaries[-1] > 0, done.stdout
    losses = [float(loss) for _, loss, *_ in lines]
    assert losses[-1] < losses[0]
