"""Without the compiled module: one warning that says how to build it, and the reference's results."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, warnings
sys.modules["localsgd_ext._C"] = None  # what an import finds where nothing was built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import localsgd_ext
    from localsgd_ext import ops, reference
    import torch
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    z, skipped = torch.nn.functional.conv2d(x, weight), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        assert torch.equal(ops.correlation(x, z, weight), reference.correlation(x, z, weight))
        before = weight.clone()
        ops.hebbian_update_(weight, x, z, 0.5, skipped=skipped)
        torch.testing.assert_close((weight - before).norm(), torch.tensor(0.5))
        ops.apply_update_([weight], [torch.zeros_like(weight)], 0.5, skipped=skipped)
    assert skipped.item() == 2
    assert not ops.is_compiled()
messages = [str(w.message) for w in caught if "localsgd_ext" in str(w.message)]
assert len(messages) == 1, messages
assert "pip install --no-build-isolation ." in messages[0], messages
print("as the reference")
"""


def test_without_the_compiled_module_the_reference_runs_and_one_warning_says_how_to_build() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "as the reference", result.stderr
