"""The machine code of every CUDA kernel on every architecture, with no GPU: that it is there, and what it takes.

sm_61 and sm_70, which nvcc 13 no longer knows, are compiled by NVRTC 12.9; the others are read from the extension's own module.
``python benchmarks/device_code.py`` prints what is tested here as a table.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from device import cubin, kernels
from device.cubin import Kernel
from device.kernels import ARCHITECTURES, Product, Resources, Variant

pytestmark = pytest.mark.skipif(not (kernels.ROOT / "setup.py").exists(), reason="tests the source tree")


@pytest.fixture(autouse=True)
def _nvrtc() -> None:
    try:
        kernels.nvrtc()
    except kernels.MissingToolError as error:
        cannot_test(str(error))


def cannot_test(why: str) -> None:
    """Skips, but where everything has to be tested."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


# ---- what is tested is what is shipped ---------------------------------------------------------------------------------


def test_the_shipped_module_is_what_is_read() -> None:
    module, targets = kernels.shipped_module()
    if module is None:
        pytest.skip("built without CUDA: NVRTC compiles all architectures for these tests")
    named = {int(target) for target in re.findall(r"sm_(\d+)", targets)}
    assert named <= kernels.shipped().keys()
    for architecture in named & set(kernels.SHIPPED):
        assert kernels.compiled(architecture) is kernels.shipped()[architecture]
    if not named >= set(kernels.SHIPPED):
        cannot_test(f"built for {targets} alone: NVRTC compiles the others of sm_75, sm_80 and sm_90 for these tests")


def test_the_shipped_module_has_ptx_for_what_comes_later() -> None:
    """The default list of architectures ends in +PTX."""
    module, targets = kernels.shipped_module()
    if module is None:
        pytest.skip("built without CUDA")
    named = [int(target) for target in re.findall(r"compute_(\d+)", targets)]
    if not named:
        cannot_test(f"built for {targets}, without PTX")
    assert kernels.shipped_ptx() == {target: {source.stem for source in kernels.sources()} for target in named}
    assert max(named) == max(int(target) for target in re.findall(r"sm_(\d+)", targets)), "PTX of the latest"


def package(directory: Path, modules: int, targets: str) -> Path:
    (directory / "_build_info.json").write_text(json.dumps({"cuda_arch_list": targets}))
    for number in range(modules):
        (directory / f"_C.cpython-31{number}-x86_64-linux-gnu.so").write_bytes(b"no code")
    return directory


def test_a_build_with_cuda_is_not_left_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.shipped_module(package(tmp_path, 2, "")) == (None, "")
    with pytest.raises(AssertionError, match=r"must hold one module, got _C\.cpython-310.*, _C\.cpython-311"):
        kernels.shipped_module(package(tmp_path, 2, "sm_80"))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(AssertionError, match="must hold one module, got none"):
        kernels.shipped_module(package(tmp_path, 0, "sm_80"))
    one = kernels.shipped_module(package(tmp_path, 1, "compute_80 sm_80"))
    monkeypatch.setattr(kernels, "shipped_module", lambda: one)
    if kernels.triton_tool("cuobjdump"):
        with pytest.raises(AssertionError, match=r"has no code for \{80\}"):
            kernels.shipped.__wrapped__()
    monkeypatch.setattr(kernels, "triton_tool", lambda _name: None)
    for read in (kernels.shipped.__wrapped__, kernels.shipped_ptx):
        with pytest.raises(AssertionError, match="needs cuobjdump, which triton brings"):
            read()


def test_where_everything_has_to_be_tested_a_missing_tool_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="needs NVRTC"):
        cannot_test("needs NVRTC 12")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="needs NVRTC"):
        cannot_test("needs NVRTC 12")


# ---- every kernel is there and multiplies ------------------------------------------------------------------------------


def test_launchers_choose_from_all_that_the_sources_instantiate() -> None:
    expected = kernels.expected()
    missing = {name for symbol, name in expected.items() if symbol not in kernels.variants()}
    assert missing == set(), "kernels that no table has, or whose table tests/device/variants.cpp does not print"
    assert kernels.variants().keys() == expected.keys()
    templates = {name.partition("<")[0] for name in expected.values()}
    assert templates >= {"direct_kernel", "direct_mma_kernel", "gram_kernel", "depthwise_kernel", "apply_kernel"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(architecture: int) -> None:
    assert {k.name for k in kernels.compiled(architecture).values()} == {cubin.demangled(s) for s in kernels.expected()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_multiply_where_they_are_chosen_and_end_the_launch_elsewhere(architecture: int) -> None:
    problems = {kernels.short(s): r.problem() for s, r in kernels.resources(architecture).items()}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_architectures_have_matrix_units_from_sm_75_on() -> None:
    """What the tables say is what was meant: fp16 from sm_75, bf16 and tf32 from sm_80, fused multiply-adds everywhere."""

    def cores(architecture: int) -> set[str]:
        chosen = (v for v in kernels.variants().values() if v.runs_on(architecture))
        return {match[0] for v in chosen for match in re.finditer(r"(?<=Core\))\d", cubin.demangled(v.symbol))}

    bf16, f16, tf32, ffma = "1", "2", "3", "0"
    assert [cores(a) - {ffma} for a in ARCHITECTURES] == [set(), set(), {f16}, {bf16, f16, tf32}, {bf16, f16, tf32}]
    assert all(any(v.runs_on(a) and v.compute == 0 for v in kernels.variants().values()) for a in ARCHITECTURES)


# ---- resources ---------------------------------------------------------------------------------------------------------

# What spills all the same: (bytes of stack, accesses to it in the main loops). A number may only go down. A few values of a loop
# that do not change are read back once for some 900 instructions; a quarter fewer warps would be the alternative.
KNOWN_SPILLS = {
    (70, "direct_kernel<Tile<64, 64>, 1, 1>"): (16, 2),
    (70, "direct_kernel<Tile<128, 64>, 1, 1>"): (16, 2),
    (70, "direct_kernel<Tile<64, 128>, 1, 1>"): (16, 2),
    (70, "direct_kernel<Tile<128, 128>, 1, 1>"): (8, 0),
    (70, "direct_kernel<Tile<128, 128>, 2, 2>"): (8, 0),
    (70, "gram_kernel<0, 128, 0, 0>"): (32, 5),
    (70, "gram_kernel<0, 64, 1, 0>"): (24, 6),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills_that_is_not_known_to(architecture: int) -> None:
    spills = {kernels.short(s): r.spills for s, r in kernels.resources(architecture).items() if any(r.spills)}
    allowed = {name: spill for (known, name), spill in KNOWN_SPILLS.items() if known == architecture}
    assert {n: s for n, s in spills.items() if s[0] > allowed.get(n, (0, 0))[0] or s[1] > allowed.get(n, (0, 0))[1]} == {}
    names = {kernels.short(symbol) for symbol in kernels.expected()}
    assert allowed.keys() <= names, "no such kernel any more"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_allow_the_threads_of_a_block(architecture: int) -> None:
    assert {
        n: r.kernel.registers for n, r in kernels.resources(architecture).items() if not 0 < r.kernel.registers <= 255
    } == {}


# Flops for each byte from global and from shared memory: that of the largest tile of a kind, and of its smallest. Registers that
# do not spill must not have been bought with tiles that starve the multipliers.
# From global memory, that is from the second-level cache, an A100 needs some 60 in 16 bits; a V100 17 in fp32, even from DRAM.
# From shared memory (128 bytes a clock and multiprocessor): fp32 cores make 256 flops a clock, which is 2, and share the issue
# slots with the loads: 8. An A100's matrix units make 2048, in tf32 1024: 16, and 8.
# Tiles for few channels have as many columns as those have: first layers are bound by memory, and read nearly z alone.
INTENSITY = {
    # multiply, bytes, few channels: (largest tile, smallest tile, shared memory)
    ("FFMA", 4, False): (32, 16, 8),
    ("HMMA", 2, False): (64, 32, 16),
    ("HMMA", 4, False): (32, 16, 8),
    ("FFMA", 4, True): (32, 16, 8),
    ("HMMA", 2, True): (160, 32, 10),
    ("HMMA", 4, True): (80, 16, 5),
}


@pytest.mark.parametrize("family", ["direct", "gram"])
def test_tiles_are_large_enough(family: str) -> None:
    kinds: dict[tuple[str, int, bool], list[kernels.Tile]] = {}
    for variant in kernels.variants().values():
        if kernels.short(variant.symbol).startswith(family):
            for product in variant.products:
                assert product.tile is not None
                few = product.tile.x_columns == 0
                kinds.setdefault((product.multiply, product.tile.bytes, few), []).append(product.tile)
    assert kinds
    for kind, tiles in kinds.items():
        largest, smallest, shared = INTENSITY[kind]
        assert max(tile.global_intensity for tile in tiles) >= largest, kind
        assert min(tile.global_intensity for tile in tiles) >= smallest, kind
        assert min(tile.shared_intensity for tile in tiles) >= shared, kind


# ---- that these tests can fail -----------------------------------------------------------------------------------------

HOLLOW = """
namespace localsgd::cuda {
template <int kSteps>
__global__ void full_kernel(float* to, float a, float b, int n) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum = sum * a + b * to[i];
    to[0] = sum;
}
__global__ void hollow_kernel(float* to, float a, float b, int n) {
#if __CUDA_ARCH__ >= 700
    float sum = 0;
    for (int i = 0; i < n; ++i) sum = sum * a + b * to[i];
    to[0] = sum;
#endif
}
__global__ void trap_kernel() { __trap(); }
template __global__ void full_kernel<1>(float*, float, float, int);
}
"""


def compile_text(text: str, directory: Path, architecture: int, *options: str) -> dict[str, Kernel]:
    source = directory / "planted.cu"
    source.write_text(text)
    return {kernels.short(s): k for s, k in kernels.compile_with_nvrtc(source, architecture, *options).kernels.items()}


@pytest.mark.parametrize("architecture", [61, 70, 80])
def test_a_hollow_kernel_is_found(tmp_path: Path, architecture: int) -> None:
    found = compile_text(HOLLOW, tmp_path, architecture)
    variant = Variant("", 0, 1 << 30, (Product("FFMA"),))
    problems = {name: Resources(kernel, variant).problem() for name, kernel in found.items()}
    hollow = "has no loop with 1 FFMA" if architecture < 70 else ""
    trap = "only ends the launch, but is chosen on this architecture"
    assert problems == {"full_kernel<1>": "", "hollow_kernel": hollow, "trap_kernel": trap}
    later = Variant("", 75, 80, (Product("FFMA"),))
    must = "must end the launch with an error, for it is not chosen on this architecture"
    assert {n: Resources(k, later).problem() for n, k in found.items()}["full_kernel<1>"] == must
    assert Resources(found["trap_kernel"], later).problem() == ""


def test_a_kernel_that_is_not_instantiated_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"planted\.cu instantiates no full_kernel"):
        compile_text(HOLLOW.replace("template __global__ void full_kernel<1>(float*, float, float, int);", ""), tmp_path, 61)


def test_a_source_that_does_not_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r'(?s)planted\.cu, --gpu-arch.*=sm_61: .*identifier "nonsense" is undefined'):
        compile_text("__global__ void kernel() { nonsense(); }", tmp_path, 61)


SPILLING = """
__global__ void spilling_kernel(float* to, int n) {
    float sum[8][8] = {};
    for (int i = 0; i < n; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int k = 0; k < 8; ++k) sum[j][k] = sum[j][k] * to[i * 16 + j] + to[i * 16 + 8 + k];
    for (int j = 0; j < 8; ++j)
        for (int k = 0; k < 8; ++k) to[j * 8 + k] = sum[j][k];
}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spills_in_a_main_loop_are_found(tmp_path: Path, architecture: int) -> None:
    variant = Variant("", 0, 1 << 30, (Product("FFMA"),))
    tight = Resources(compile_text(SPILLING, tmp_path, architecture, "--maxrregcount=32")["spilling_kernel"], variant)
    wide = Resources(compile_text(SPILLING, tmp_path, architecture)["spilling_kernel"], variant)
    assert tight.kernel.registers <= 32 < wide.kernel.registers
    assert min(tight.spills) > 16
    assert wide.spills == (0, 0)
    assert tight.multiplies(Product("FFMA")) > 0


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a >= 75])
def test_grid_barriers_release_and_acquire(architecture: int) -> None:
    """Sequentially consistent fences, of which there would be two a barrier, order more than it needs."""
    nvdisasm = kernels.triton_tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm, which triton brings")
    compiled = kernels.compile_with_nvrtc(kernels.ROOT / "csrc" / "kernels" / "apply.cu", architecture)
    listing = subprocess.run([nvdisasm, compiled.path], capture_output=True, text=True, check=True).stdout
    assert "MEMBAR.SC" not in listing
    assert "MEMBAR.ALL.GPU" in listing
    assert "STRONG.SYS" not in listing  # polls
    assert re.search(r"ATOMG?\.E\.ADD\.STRONG\.GPU", listing)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a >= 75])
def test_instructions_are_what_the_disassembler_reads(tmp_path: Path, architecture: int) -> None:
    nvdisasm = kernels.triton_tool("nvdisasm")
    if nvdisasm is None:
        pytest.skip("needs nvdisasm, which triton brings")
    source = tmp_path / "planted.cu"
    source.write_text(SPILLING + HOLLOW)
    compiled = kernels.compile_with_nvrtc(source, architecture, "--maxrregcount=32")
    listing = subprocess.run([nvdisasm, compiled.path], capture_output=True, text=True, check=True).stdout
    for symbol, kernel in compiled.kernels.items():
        text = listing.partition(f"\n.text.{symbol}:")[2].partition("\n//---")[0]
        labels: dict[str, int] = {}
        read: dict[int, tuple[str, str]] = {}
        waiting: list[str] = []
        for line in text.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                waiting.append(label[1])
            elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]*)(.*)", line):
                address = int(instruction[1], 16)
                labels |= dict.fromkeys(waiting, address)
                waiting = []
                read[address] = instruction[2], instruction[3]
        known = {"FFMA", "DFMA", "HMMA", "LDL", "STL", "BRA", "EXIT", "RET", "NOP", "BPT"}
        assert {i.address: i.name for i in kernel.instructions} == {a: n if n in known else "" for a, (n, _) in read.items()}
        for i in kernel.instructions:
            if i.name == "BRA":
                assert i.target == labels[re.findall(r"\.L_\w+", read[i.address][1])[0]]
