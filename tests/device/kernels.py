"""Compiles the device sources, or takes what setup.py compiled, and says which kernels there ought to be."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from device.cubin import SPILLS, Kernel, Loop, demangled, read_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "device_code"
ARCHITECTURES = (61, 70, 75, 80, 90)  # GTX 1080 Ti, V100, T4, A100, H100
SHIPPED = (75, 80, 90)  # of those, the ones that setup.py compiles for by default


class MissingToolError(Exception):
    """What has to be installed for this."""


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time of a matrix product, in ``bytes``-wide operands; a warp takes ``warp_m`` x ``warp_n``."""

    m: int
    n: int
    warp_m: int
    warp_n: int
    bytes: int
    x_columns: int
    """Columns that are read from global memory: all, but for kernels that find them in segments of few channels."""

    @property
    def global_intensity(self) -> float:
        """Flops for each byte that is read from global memory, where both operands are as wide as in shared memory."""
        return 2 * self.m * self.n / (self.bytes * (self.m + self.x_columns))

    @property
    def shared_intensity(self) -> float:
        """Flops for each byte that a warp reads from shared memory."""
        return 2 * self.warp_m * self.warp_n / (self.bytes * (self.warp_m + self.warp_n))


@dataclass(frozen=True)
class Product:
    """What a kernel multiplies, with which instruction; without a tile if it is bound by memory."""

    multiply: str
    tile: Tile | None = None

    @property
    def least(self) -> int:
        """Multiplying instructions in a pass through its main loop: at least a tile's, for one step of the summed index."""
        each = 128 if self.multiply == "HMMA" else 32  # results of a warp's instruction
        return self.tile.warp_m * self.tile.warp_n // each if self.tile else 1


@dataclass(frozen=True)
class Variant:
    """A kernel as the launchers' tables describe it: it is chosen only where ``compute <= architecture < compute_end``."""

    symbol: str
    compute: int
    compute_end: int
    products: tuple[Product, ...]

    def runs_on(self, architecture: int) -> bool:
        return self.compute <= architecture < self.compute_end


@dataclass(frozen=True)
class Resources:
    """Of a kernel on an architecture."""

    kernel: Kernel
    variant: Variant

    @property
    def traps(self) -> bool:
        return self.kernel.only_traps

    @cached_property
    def loops(self) -> list[Loop]:
        return [loop for p in self.variant.products for loop in self.kernel.main_loops(p.multiply, p.least)]

    def multiplies(self, product: Product) -> int:
        return self.kernel.count_in(self.kernel.main_loops(product.multiply, product.least), product.multiply)

    @property
    def spills(self) -> tuple[int, int]:
        """Bytes of stack, and accesses to it in the main loops."""
        return self.kernel.frame, self.kernel.count_in(self.loops, *SPILLS)

    def problem(self) -> str:
        """What is wrong with the code, or an empty string."""
        expected = self.variant.runs_on(self.kernel.architecture)
        if self.traps:
            return "only ends the launch, but is chosen on this architecture" if expected else ""
        if not expected:
            return "must end the launch with an error, for it is not chosen on this architecture"
        for product in self.variant.products:
            if self.multiplies(product) == 0:
                return f"has no loop with {product.least} {product.multiply}"
        return ""


def sources(root: Path = ROOT) -> list[Path]:
    lines = (line.partition("#")[0].split() for line in (root / "csrc" / "sources.txt").read_text().splitlines())
    return [root / words[1] for words in lines if words and words[0] == "cuda"]


# ---- what there ought to be --------------------------------------------------------------------------------------------


def instantiated(source: Path, *options: str) -> list[str]:
    """The kernels that a source defines, in its own words: explicit instantiations of templates, and plain functions."""
    command = ["c++", "-E", "-P", "-x", "c++", "-std=c++20", "-D__CUDACC_RTC__", f"-I{ROOT / 'csrc'}", *options, str(source)]
    text = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    names = re.findall(r"template __global__ void ([^()]+?)\s*\(", text)
    for template, name in re.findall(r"(template <[^{};]*> )?__global__ void (?:__launch_bounds__\([^{;]*?\) )?(\w+)\(", text):
        if not template:
            names.append(name)
        elif not any(n.startswith(f"{name}<") for n in names) and name in source.read_text():
            raise AssertionError(f"{source.name} instantiates no {name}")
    return names


@cache
def variants() -> dict[str, Variant]:
    """``{symbol: variant}`` from the tables that the launchers choose from."""
    program = Path(__file__).with_name("variants.cpp")
    emulation = ROOT / "tests" / "native"
    key = _digest(program, *sources(), *_headers(), *sorted((emulation / "emulation").iterdir()))
    binary = CACHE / f"variants-{key}"
    if not binary.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++20", "-O0", "-w", "-rdynamic", "-DLOCALSGD_EMULATION", f"-I{ROOT / 'csrc'}", f"-I{emulation}"]
        for source in sources():
            options += ["-include", str(source)]
        partial = binary.with_suffix(f".{os.getpid()}")
        subprocess.run(["c++", *options, str(program), "-o", str(partial), "-pthread", "-ldl"], check=True)
        partial.replace(binary)
    found = {}
    for line in subprocess.run([binary], capture_output=True, text=True, check=True).stdout.split("\n")[1:-1]:
        symbol, compute, compute_end, *products = line.split()
        parts = (product.partition(":") for product in products)
        known = tuple(Product(name, Tile(*map(int, tile.split("x"))) if tile else None) for name, _, tile in parts)
        found[symbol] = Variant(symbol, int(compute), int(compute_end), known)
    return found


# ---- what there is -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    path: Path
    kernels: dict[str, Kernel]  # by symbol
    expected: dict[str, str]  # the symbols of what was instantiated: the source's words


@cache
def nvrtc() -> ctypes.CDLL:
    """NVRTC 12.9, the last that compiles for sm_61 and sm_70; PyPI has it, beside any other version that torch brings."""
    spec = importlib.util.find_spec("nvidia")
    for directory in spec.submodule_search_locations or () if spec else ():
        for library in Path(directory, "cuda_nvrtc", "lib").glob("libnvrtc.so.12"):
            return ctypes.CDLL(str(library))
    raise MissingToolError('needs NVRTC 12: pip install "nvidia-cuda-nvrtc-cu12==12.9.*" (in the extra [test])')


def compile_with_nvrtc(source: Path, architecture: int, *options: str) -> Compiled:
    """A device source on its own, without the host's half."""
    library = nvrtc()
    flags = [f"--gpu-architecture=sm_{architecture}", "--std=c++20", "-default-device", f"-I{ROOT / 'csrc'}", *options]
    names = instantiated(source, *(option for option in options if option.startswith("-D")))
    key = _digest(source, *_headers(), text=" ".join([str(architecture), *flags, *names]))
    stored = CACHE / f"{source.stem}.sm_{architecture}.{key}.cubin"
    listing = stored.with_suffix(".names")
    if not listing.exists():
        cubin, symbols = _run_nvrtc(library, source, flags, names)
        CACHE.mkdir(parents=True, exist_ok=True)
        _write(stored, cubin)
        _write(listing, "".join(f"{symbol} {name}\n" for symbol, name in symbols.items()).encode())
    expected = dict(line.split(" ", 1) for line in listing.read_text().splitlines())
    return Compiled(stored, read_kernels(stored.read_bytes(), architecture), expected)


def _run_nvrtc(library: ctypes.CDLL, source: Path, flags: list[str], names: list[str]) -> tuple[bytes, dict[str, str]]:
    text = source.read_text() + "\nnamespace localsgd::cuda {}\nusing namespace localsgd::cuda;\n"  # for the names
    # Includes are relative to the program's name.
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def call(function: str, *arguments: object) -> None:
        status = getattr(library, function)(*arguments)
        if status == 0:
            return
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise AssertionError(f"{source.name}, {flags[0]}: {function} failed:\n{log.value.decode()[:4000]}")

    call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), str(source).encode(), 0, None, None)
    for name in names:
        call("nvrtcAddNameExpression", program, name.encode())
    call("nvrtcCompileProgram", program, len(flags), (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags)))
    symbols = {}
    for name in names:
        symbol = ctypes.c_char_p()
        call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(symbol))
        symbols[(symbol.value or b"").decode()] = name
    call("nvrtcGetCUBINSize", program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    call("nvrtcGetCUBIN", program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, symbols


@cache
def compiled(architecture: int) -> dict[str, Kernel]:
    """Every kernel on an architecture: from the extension's module if that was built for it, else compiled with NVRTC."""
    kernels = shipped().get(architecture) if architecture in SHIPPED else None
    if kernels is None:
        kernels = {}
        for part in _compile_all((architecture,)).values():
            kernels |= part.kernels
    return kernels


def _compile_all(architectures: tuple[int, ...]) -> dict[tuple[Path, int], Compiled]:
    jobs = [(source, architecture) for architecture in architectures for source in sources()]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_with_nvrtc(*job), jobs), strict=True))


@cache
def expected() -> dict[str, str]:
    """``{symbol: the source's words}`` of all kernels that the sources instantiate."""
    return {symbol: name for part in _compile_all((61,)).values() for symbol, name in part.expected.items()}


def resources(architecture: int) -> dict[str, Resources]:
    """``{symbol: resources}`` of all kernels that are in both the binary and the launchers' tables."""
    known = variants()
    return {symbol: Resources(k, known[symbol]) for symbol, k in compiled(architecture).items() if symbol in known}


@cache
def shipped() -> dict[int, dict[str, Kernel]]:
    """``{architecture: {symbol: kernel}}`` of what the extension's module contains; empty if it was built without CUDA."""
    module, targets = shipped_module()
    if module is None:
        return {}
    found: dict[int, dict[str, Kernel]] = {}
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([cuobjdump(), "-xelf", "all", module], cwd=directory, capture_output=True, check=False)
        for path in Path(directory).glob("*.cubin"):
            if match := re.search(r"\.sm_(\d+)\.cubin$", path.name):
                found.setdefault(int(match[1]), {}).update(read_kernels(path.read_bytes(), int(match[1])))
    lacking = {int(target) for target in re.findall(r"sm_(\d+)", targets)} - found.keys()
    assert not lacking, f"{module} has no code for {lacking}, but its build info names {targets}"
    return found


def shipped_ptx() -> dict[int, set[str]]:
    """``{architecture: sources}`` of the PTX in the extension's module, which the driver compiles for what comes later."""
    module, _ = shipped_module()
    if module is None:
        return {}
    listed = subprocess.run([cuobjdump(), "-lptx", module], capture_output=True, text=True, check=True).stdout
    found: dict[int, set[str]] = {}
    for source, architecture in re.findall(r": ([\w.]+)\.sm_(\d+)\.ptx", listed):
        found.setdefault(int(architecture), set()).add(source)
    return found


def shipped_module(package: Path = ROOT / "localsgd_ext") -> tuple[Path | None, str]:
    """The extension's module and the targets for which it says that it was built; None if it says that it was built without CUDA."""
    info = package / "_build_info.json"
    targets = json.loads(info.read_text())["cuda_arch_list"] if info.exists() else ""
    if not targets:
        return None, ""
    modules = sorted(package.glob("_C*.so"))
    names = ", ".join(module.name for module in modules) or "none"
    assert len(modules) == 1, f"{package} must hold one module, got {names}: `make clean build`"
    return modules[0], targets


def cuobjdump() -> Path:
    tool = triton_tool("cuobjdump")
    assert tool is not None, "the module was built with CUDA: to read it needs cuobjdump, which triton brings"
    return tool


def triton_tool(name: str) -> Path | None:
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    return path if path is not None and path.exists() else None


def _headers() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*.*h"))


def _digest(*paths: Path, text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _write(path: Path, contents: bytes) -> None:
    """At once, for other processes may be at the same."""
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(contents)
    partial.replace(path)


def short(symbol: str) -> str:
    """The name without namespaces, casts and what follows from the rest: ``direct_kernel<Tile<64, 64>, 1, 1>``."""
    name = demangled(symbol).replace("localsgd::cuda::", "")
    return re.sub(r"\(\w+\)|, \w+Paths<[^<>]*> ?", "", name)
