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
    return left ? max(i <= 3 ? 1 : 2, static_cast<int>(n) < 4) : p[min(n - 1, int{i})];
}
#if !defined(__CUDACC_RTC__)
inline int host(int i) { return i < std::min(3, min(4, 5)); }
#endif
""")
    names = [mutant.name for mutant in mutations.find(path)]
    expected = ["never i < 0", "never i >= n", "always i < n / 2", "always i > -1", "without __syncthreads();"]
    expected += ["always i <= 3", "always static_cast<int>(n) < 4"]
    expected += ["min() is int{i}, not n - 1", "min() is n - 1, not int{i}"]
    assert names == [f"guarded: {name}" for name in expected]


def test_a_bound_by_min_is_lifted(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cuh"
    path.write_text("LOCALSGD_DEVICE int bounded(int i) { return min(i, int{3}); }\n")
    text = path.read_text()
    for number, mutant in reversed(list(enumerate(mutations.find(path)))):
        text = text[: mutant.begin] + mutations.planted(mutant, number, text) + text[mutant.end :]
    planted = "min((mutation::planted(0) ? int{3} : i), (mutation::planted(1) ? i : int{3}))"
    assert text == f"LOCALSGD_DEVICE int bounded(int i) {{ return {planted}; }}\n"


def test_every_min_of_the_kernels_is_planted_twice() -> None:
    found = [mutant for mutant in mutations.all_mutants() if ": min() is " in mutant.name]
    calls = sum(len(re.findall(r"(?<![\w:.])min\(", path.read_text())) for path in mutations.KERNELS.glob("*.cuh"))
    assert len(found) == 2 * calls > 20


def test_a_result_rests_on_the_tests_that_made_it() -> None:
    """A killer that was changed may have been weakened; what survived, another test may kill."""
    prints = {"test_cuda_a": "1", "test_cuda_b": "2"}
    results = {"x": "killed by test_cuda_a: wrong", "y": "survives test_cuda_b", "z": "met by no test"}
    faults = {key: {"result": result, "tests": mutations.rests_on(result, prints)} for key, result in results.items()}
    earlier = {"kernels": "k", "faults": faults}
    assert mutations.still_true(earlier, "k", prints) == faults
    assert mutations.still_true(earlier, "k", {**prints, "test_cuda_b": "3"}).keys() == {"x"}
    assert mutations.still_true(earlier, "k", {**prints, "test_cuda_c": "4"}).keys() == {"x"}
    assert mutations.still_true(earlier, "k", {**prints, "test_cuda_a": "3"}) == {}
    assert mutations.still_true(earlier, "k", {"test_cuda_b": "2"}) == {}
    assert mutations.still_true(earlier, "other kernels", prints) == {}
    assert mutations.still_true({"kernels": "k", "tests": "t", "results": {}}, "k", prints) == {}  # of an earlier version


def test_what_tests_share_is_part_of_each_ones_fingerprint(tmp_path: Path) -> None:
    names = ["test_cuda_a", "test_cuda_b", "test_cuda_a_sm75"]
    for name, text in zip(names, ("a", "b", '#include "test_cuda_a.cpp"\n'), strict=True):
        (tmp_path / f"{name}.cpp").write_text(text)
    (tmp_path / "check.h").write_text("shared")
    before = mutations.prints_of(names, tmp_path)
    (tmp_path / "test_cuda_a.cpp").write_text("weaker")
    one = mutations.prints_of(names, tmp_path)
    assert [name for name in names if one[name] != before[name]] == ["test_cuda_a", "test_cuda_a_sm75"]
    (tmp_path / "check.h").write_text("changed")
    both = mutations.prints_of(names, tmp_path)
    assert all(both[name] != one[name] for name in names)


def test_equivalent_faults_exist_and_have_a_reason() -> None:
    listed = mutations.equivalents()
    assert listed.keys() <= {mutant.key for mutant in mutations.all_mutants()}
    assert all(re.search(r"\w+ \w+ \w+", reason) for reason in listed.values())


@pytest.mark.slow
def test_a_sample_of_faults_is_found(tmp_path: Path) -> None:
    results = mutations.run_sample(["test_cuda_apply", "test_cuda_depthwise"], count=8, seed=0, build=tmp_path)
    assert {key: result for key, result in results.items() if not result.startswith("killed")} == {}
