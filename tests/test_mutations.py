"""Faults planted in the device code make the emulated tests fail: a sample of what ``make mutants`` tries in full."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native import mutations

pytestmark = pytest.mark.skipif(not (mutations.ROOT / "setup.py").exists(), reason="tests the source tree")


def test_every_barrier_is_tried() -> None:
    """Counted by other means than the finder's: in the text, line by line."""
    found = mutations.all_mutants()
    for path in mutations.KERNELS.glob("*.cuh"):
        lines = [line.partition("//")[0] for line in path.read_text().splitlines()]
        barriers = sum("__syncthreads();" in line or "__syncwarp(" in line for line in lines)
        assert sum(m.file == path.name and "__sync" in m.name for m in found) == barriers, path.name
    assert any("cp_async_wait" in mutant.name for mutant in found)
    assert len({mutant.key for mutant in found}) == len(found)


def test_faults_are_planted_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cuh"
    path.write_text("""
LOCALSGD_DEVICE int guarded(const int* p, int i, int n) {
    if (i < 0 || i >= n) return 0; // i < n
    const bool left = i < n / 2 && i > -1;
    for (int j = 0; j < n; ++j) {
        __syncthreads();
    }
    return left ? max(i <= 3 ? 1 : 2, static_cast<int>(n) < 4) : p[i];
}
#if !defined(__CUDACC_RTC__)
inline int host(int i) { return i < 3; }
#endif
""")
    names = [mutant.name for mutant in mutations.find(path)]
    expected = ["never i < 0", "never i >= n", "always i < n / 2", "always i > -1", "without __syncthreads();"]
    assert names == [f"guarded: {name}" for name in [*expected, "always i <= 3", "always static_cast<int>(n) < 4"]]


def test_equivalent_faults_exist_and_have_a_reason() -> None:
    listed = mutations.equivalents()
    assert listed.keys() <= {mutant.key for mutant in mutations.all_mutants()}
    assert all(re.search(r"\w+ \w+ \w+", reason) for reason in listed.values())


@pytest.mark.slow
def test_a_sample_of_faults_is_found(tmp_path: Path) -> None:
    results = mutations.run_sample(["test_cuda_apply", "test_cuda_depthwise"], count=8, seed=0, build=tmp_path)
    assert {key: result for key, result in results.items() if not result.startswith("killed")} == {}
