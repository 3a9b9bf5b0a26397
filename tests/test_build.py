"""The build: where a CUDA toolkit is found, what LOCALSGD_CUDA does, what an sdist and a wheel hold, what is rebuilt."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from localsgd_ext import _cuda_toolkit as toolkits
from localsgd_ext import doctor

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="tests the source tree")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """setup.py's functions; it builds only where it is the main module."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


# ---- the toolkit -------------------------------------------------------------------------------------------------------


def fake_toolkit(home: Path, version: str = "13.0", without: tuple[str, ...] = ()) -> Path:
    """A toolkit's files in the layout of a system install; nvcc only tells its version."""
    files = {
        "bin/nvcc": f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n",
        "include/cuda_runtime.h": "",
        "include/crt/host_config.h": "",
        "include/cccl/nv/target": "",
        "nvvm/bin/cicc": "",
        f"lib/libcudart.so.{version.split('.')[0]}": "",
    }
    for name, text in files.items():
        if name not in without:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
    return home


def find(torch_cuda: str = "13.0", environ: dict[str, str] | None = None, site: Path | None = None, system: Path | None = None):
    return toolkits.find_toolkit(
        torch_cuda,
        environ=environ or {},
        site_dirs=[] if site is None else [site],
        default_homes=[] if system is None else [system],
    )


def test_toolkit_in_cuda_home(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    found = find(environ={"CUDA_HOME": str(home)})
    assert (found.home, found.version) == (home, "13.0")
    assert (found.nvcc, found.include) == (home / "bin/nvcc", home / "include")
    assert found.cudart == home / "lib" / "libcudart.so.13"  # the wheels have no libcudart.so
    assert find(environ={"CUDA_PATH": str(home)}).home == home


def test_toolkit_in_cuda_home_is_never_passed_over(tmp_path: Path) -> None:
    good = fake_toolkit(tmp_path / "good")
    with pytest.raises(toolkits.ToolkitError, match=r"CUDA_HOME=/nowhere: there is no bin/nvcc"):
        find(environ={"CUDA_HOME": "/nowhere", "PATH": str(good / "bin")}, system=good)


def test_toolkit_on_path(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    assert find(environ={"PATH": str(home / "bin")}).home == home


def test_toolkit_behind_a_link_on_path(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr" / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert find(environ={"PATH": str(tmp_path / "usr" / "bin")}).home == home


def test_toolkit_on_path_without_headers_gives_way_to_the_next(tmp_path: Path) -> None:
    wrapper = fake_toolkit(tmp_path / "wrapper", without=("include/cuda_runtime.h",))
    home = fake_toolkit(tmp_path / "cuda")
    assert find(environ={"PATH": str(wrapper / "bin")}, system=home).home == home


def test_toolkit_in_wheels(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "nvidia" / "cu13")
    assert find(site=tmp_path).home == home


def test_toolkit_in_wheels_of_another_directory_than_the_runtime(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda", without=("lib/libcudart.so.13",))
    runtime = tmp_path / "site" / "nvidia" / "cu13" / "lib"
    runtime.mkdir(parents=True)
    (runtime / "libcudart.so.13").touch()
    assert find(system=home, site=tmp_path / "site").cudart == runtime / "libcudart.so.13"


def test_toolkit_of_conda_layout(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "env")
    (home / "targets" / "x86_64-linux").mkdir(parents=True)
    (home / "include").rename(home / "targets" / "x86_64-linux" / "include")
    assert find(environ={"CUDA_HOME": str(home)}).include == home / "targets" / "x86_64-linux" / "include"


def test_toolkit_of_another_major_is_refused(tmp_path: Path) -> None:
    old = fake_toolkit(tmp_path / "old", version="12.9")
    with pytest.raises(
        toolkits.ToolkitError, match=r"its nvcc is 12\.9, but torch was built with CUDA 13\.0: the major versions"
    ):
        find("13.0", system=old)
    assert find("12.6", system=old).version == "12.9"  # a minor version may differ


def test_toolkit_of_another_major_gives_way_to_one_that_fits(tmp_path: Path) -> None:
    old, wheels = fake_toolkit(tmp_path / "old", version="12.9"), fake_toolkit(tmp_path / "nvidia" / "cu13")
    assert find("13.0", environ={"PATH": str(old / "bin")}, site=tmp_path).home == wheels


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("include/cuda_runtime.h", "package cudart"),
        ("include/crt/host_config.h", "package crt"),
        ("include/cccl/nv/target", "package cccl"),
        ("nvvm/bin/cicc", "package nvvm"),
        ("lib/libcudart.so.13", "package cudart"),
    ],
)
def test_toolkit_that_is_incomplete_names_what_lacks(tmp_path: Path, missing: str, message: str) -> None:
    with pytest.raises(toolkits.ToolkitError, match=message):
        find(system=fake_toolkit(tmp_path / "cuda", without=(missing,)))


def test_toolkit_whose_nvcc_does_not_run(tmp_path: Path) -> None:
    home = fake_toolkit(tmp_path / "cuda")
    (home / "bin" / "nvcc").chmod(0o644)
    with pytest.raises(toolkits.ToolkitError, match="does not run"):
        find(system=home)


def test_no_toolkit_says_how_to_get_one() -> None:
    with pytest.raises(toolkits.ToolkitError, match=r'no nvcc in .*pip install "cuda-toolkit\[nvcc,cccl,cudart\]==13\.0\.\*"'):
        find("13.0")
    with pytest.raises(toolkits.ToolkitError, match=r"install the CUDA 12\.6 toolkit of your system and set CUDA_HOME"):
        find("12.6")


# ---- LOCALSGD_CUDA -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")


@pytest.fixture
def nvcc_13(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def test_cuda_choice_must_be_known(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"LOCALSGD_CUDA must be 0, 1 or auto, got 'yes'"):
        setup_py.choose_toolkit(["a.cu"], "yes", "13.0")


@pytest.mark.parametrize("choice", ["auto", "1", "", None])
def test_cuda_on_where_nvcc_is_usable(setup_py: ModuleType, nvcc_13: Path, choice: str | None) -> None:
    toolkit, remark = setup_py.choose_toolkit(["a.cu"], choice, "13.0")
    assert (toolkit.home, remark) == (nvcc_13, "")


def test_cuda_off(setup_py: ModuleType, nvcc_13: Path) -> None:
    assert setup_py.choose_toolkit(["a.cu"], "0", "13.0") == (None, "")


@pytest.mark.usefixtures("no_nvcc")
def test_cuda_demanded_without_nvcc_is_an_error(setup_py: ModuleType) -> None:
    with pytest.raises(
        SystemExit, match=r"LOCALSGD_CUDA=1, but CUDA kernels cannot be built: CUDA_HOME=/nowhere: .*pip install"
    ):
        setup_py.choose_toolkit(["a.cu"], "1", "13.0")


def test_cuda_demanded_with_a_cpu_torch_is_an_error(setup_py: ModuleType, nvcc_13: Path) -> None:
    with pytest.raises(SystemExit, match="was built without CUDA; install a CUDA build of torch"):
        setup_py.choose_toolkit(["a.cu"], "1", None)


@pytest.mark.usefixtures("no_nvcc")
def test_cuda_auto_without_nvcc_falls_back_with_one_line(setup_py: ModuleType) -> None:
    toolkit, remark = setup_py.choose_toolkit(["a.cu"], "auto", "13.0")
    assert toolkit is None
    assert remark.startswith("building without CUDA kernels: CUDA_HOME=/nowhere: there is no bin/nvcc")
    assert "\n" not in remark


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_cuda_without_sources_is_said(setup_py: ModuleType, nvcc_13: Path, choice: str) -> None:
    toolkit, remark = setup_py.choose_toolkit([], choice, "13.0")
    assert (toolkit, remark) == (None, "this version has no CUDA sources: building the CPU kernels only")


def test_jobs_follow_max_jobs(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("MAX_JOBS", "7")
    setup_py.set_environment(None)
    assert os.environ["MAX_JOBS"] == "7"
    monkeypatch.setenv("MAX_JOBS", "")
    setup_py.set_environment(None)
    assert 1 <= int(os.environ["MAX_JOBS"]) <= len(os.sched_getaffinity(0))


def test_a_second_build_waits_for_the_first(setup_py: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    path = tmp_path / "build" / "objects.lock"

    def second() -> None:
        with setup_py.one_at_a_time(path):
            order.append("second")

    with setup_py.one_at_a_time(path):
        other = threading.Thread(target=second)
        other.start()
        said = ""
        while "waiting for another build" not in said:
            said += capsys.readouterr().err
            other.join(0.01)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    with setup_py.one_at_a_time(path):
        pass
    assert capsys.readouterr().err == ""


# ---- the list of sources -----------------------------------------------------------------------------------------------


def test_every_source_file_is_listed_once(setup_py: ModuleType) -> None:
    listed = [path for paths in setup_py.read_sources().values() for path in paths]
    on_disk = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cc", ".cu")]
    assert sorted(listed) == sorted(on_disk)


def test_groups_hold_what_they_promise(setup_py: ModuleType) -> None:
    sources = setup_py.read_sources()
    assert all(path.endswith(".cu") for path in sources["cuda"])
    for path in sources["core"] + sources["cuda"]:
        included = re.findall(r'#include [<"]([^>"]+)', (ROOT / path).read_text())
        assert not [h for h in included if h.startswith(("torch/", "ATen/", "c10/", "pybind11/"))], (
            f"{path} must not need torch"
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("core csrc/a.cpp extra", "sources.txt:2: expected '<core|torch|cuda|glue> <path>'"),
        ("kernel csrc/a.cpp", "sources.txt:2: expected"),
        ("core csrc/gone.cpp", "sources.txt:2: csrc/gone.cpp does not exist"),
    ],
)
def test_a_wrong_line_is_named(setup_py: ModuleType, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").touch()
    (tmp_path / "csrc" / "sources.txt").write_text(f"core csrc/a.cpp  # comment\n{text}\n")
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup_py.read_sources(tmp_path)


# ---- real builds, of small sources -------------------------------------------------------------------------------------

TOY_BINDING = """
#include <pybind11/pybind11.h>
#include "cpu/toy.h"
#ifdef LOCALSGD_WITH_CUDA
void launch_toy_scale(float* x, float factor, int size);
#endif
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("answer", [] { return kOffset + toy(); });
#ifdef LOCALSGD_WITH_CUDA
  m.def("scale", [](size_t x, float factor, int size) { launch_toy_scale(reinterpret_cast<float*>(x), factor, size); });
#endif
}
"""
TOY_KERNEL = """
__global__ void toy_scale_kernel(float* x, float factor, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) x[i] *= factor;
}
void launch_toy_scale(float* x, float factor, int size) { toy_scale_kernel<<<(size + 255) / 256, 256>>>(x, factor, size); }
"""
ASK = "import torch, localsgd_ext._C as c; print(c.answer(), hasattr(c, 'scale'), c.__file__)"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """This tree's build and package with three small files for sources."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "localsgd_ext",
        tmp_path / "localsgd_ext",
        ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__"),
    )
    (tmp_path / "localsgd_ext" / "__init__.py").write_text("")  # the package's half needs the real module
    for name, text in {
        "cpu/toy.h": "#pragma once\nconstexpr int kOffset = 40;\nint toy();\n",
        "cpu/toy.cpp": '#include "cpu/toy.h"\nint toy() { return 2; }\n',
        "binding.cpp": TOY_BINDING,
        "kernels/toy.cu": TOY_KERNEL,
        "sources.txt": "core csrc/cpu/toy.cpp\ntorch csrc/binding.cpp\n",
    }.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    return tmp_path


def build(tree: Path, **environ: str) -> str:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **environ)


def compiled(output: str) -> set[str]:
    """The sources that ninja compiled."""
    return {Path(path).name for path in re.findall(r"^\[\d+/\d+\].* -c (\S+)", output, re.MULTILINE)}


@pytest.mark.slow
def test_without_nvcc_builds_with_one_line_of_notice_and_an_edit_rebuilds_what_it_touches(toy: Path) -> None:
    with (toy / "csrc" / "sources.txt").open("a") as sources:
        sources.write("cuda csrc/kernels/toy.cu\n")
    output = build(toy, LOCALSGD_CUDA="auto", CUDA_HOME="/nowhere")
    assert compiled(output) == {"toy.cpp", "binding.cpp"}
    assert len([line for line in output.splitlines() if line.startswith("localsgd_ext: building without CUDA kernels")]) == 1
    assert json.loads((toy / "localsgd_ext" / "_build_info.json").read_text())["cuda_arch_list"] == ""
    assert run(sys.executable, "-c", ASK, cwd=toy).split()[:2] == ["42", "False"]

    output = build(toy, LOCALSGD_CUDA="0")
    assert "no work to do" in output

    (toy / "csrc" / "cpu" / "toy.cpp").write_text('#include "cpu/toy.h"\nint toy() { return 3; }\n')
    output = build(toy, LOCALSGD_CUDA="0")
    assert compiled(output) == {"toy.cpp"}
    assert run(sys.executable, "-c", ASK, cwd=toy).startswith("43 ")

    (toy / "csrc" / "cpu" / "toy.h").write_text("#pragma once\nconstexpr int kOffset = 50;\nint toy();\n")
    output = build(toy, LOCALSGD_CUDA="0")
    assert compiled(output) == {"toy.cpp", "binding.cpp"}  # both include it
    assert run(sys.executable, "-c", ASK, cwd=toy).startswith("53 ")


def real_toolkit() -> toolkits.Toolkit | None:
    try:
        return toolkits.find_toolkit(torch.version.cuda or "0")
    except toolkits.ToolkitError:
        return None


@pytest.mark.slow
def test_cuda_sources_are_compiled_for_every_architecture(toy: Path) -> None:
    """From a toolkit laid out as PyPI's wheels are: no libcudart.so, no nvcc on PATH."""
    real = real_toolkit()
    if real is None:
        pytest.skip("needs nvcc")
    wheels = toy / "site" / "nvidia" / "cu13"
    (wheels / "lib").mkdir(parents=True)
    for name in ("bin", "include", "nvvm"):
        (wheels / name).symlink_to(real.home / name)
    (wheels / "lib" / f"libcudart.so.{real.version.split('.')[0]}").symlink_to(real.cudart.resolve())
    with (toy / "csrc" / "sources.txt").open("a") as sources:
        sources.write("cuda csrc/kernels/toy.cu\n")
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or "7.5;8.0;9.0+PTX"

    output = build(toy, LOCALSGD_CUDA="1", CUDA_HOME=str(wheels), TORCH_CUDA_ARCH_LIST=arch_list)

    assert compiled(output) == {"toy.cpp", "binding.cpp", "toy.cu"}
    assert run(sys.executable, "-c", ASK, cwd=toy).split()[:2] == ["42", "True"]
    targets = {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in re.split("[; ]", arch_list)}
    info = json.loads((toy / "localsgd_ext" / "_build_info.json").read_text())
    assert targets <= set(info["cuda_arch_list"].split())
    assert info["nvcc"] == real.version
    [module] = (toy / "localsgd_ext").glob("_C.*.so")
    kernels = doctor.compiled_kernels(module)
    assert set(kernels) == {"toy_scale_kernel"}, "cuobjdump (CUDA toolkit or triton) must list the kernel"
    assert set(kernels["toy_scale_kernel"]) == targets


TOY_TEST = """
#include "cpu/toy.h"
int main() { return toy() == 2 ? 0 : 1; }
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["OFF", "ON"])
def test_cmake_builds_and_tests_the_same_sources_without_python(toy: Path, sanitize: str) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake is not None, "cmake comes with the extra [dev]"
    ctest = Path(cmake).with_name("ctest")
    (toy / "tests" / "native").mkdir(parents=True)
    (toy / "tests" / "native" / "toy_test.cpp").write_text(TOY_TEST)
    (toy / "tests" / "native" / "toy_elsewhere.cpp").write_text("int main() { return 77; }")
    with (toy / "csrc" / "sources.txt").open("a") as sources:
        sources.write("\n  # a comment\ncuda csrc/kernels/toy.cu  # another\n")
    (toy / "csrc" / "binding.cpp").write_text("#error CMake must not compile the group 'torch'")
    environ = {"PATH": "/usr/bin:/bin"}
    toolkit = real_toolkit()
    if toolkit is not None:
        environ["CUDACXX"] = str(toolkit.nvcc)

    output = run(cmake, "-S", ".", "-B", "out", f"-DLOCALSGD_SANITIZE={sanitize}", cwd=toy, **environ)
    assert ("CUDA kernels: built for 75-real;80-real;90" if toolkit else "CUDA kernels: not built, no CUDA compiler") in output
    run(cmake, "--build", "out", cwd=toy)
    said = run(ctest, "--test-dir", "out", cwd=toy)
    assert re.search("100% tests passed.* out of 2", said)
    assert re.search(r"did not run:\s+\d - toy_elsewhere \(Skipped\)", said)
    if toolkit is not None:
        [archive] = (toy / "out").glob("**/toy.cu.o")
        assert set(doctor.compiled_kernels(archive)["toy_scale_kernel"]) == {"sm_75", "sm_80", "sm_90"}

    (toy / "csrc" / "cpu" / "toy.cpp").write_text('#include "cpu/toy.h"\nint toy() { return 3; }\n')
    run(cmake, "--build", "out", cwd=toy)
    with pytest.raises(AssertionError, match="toy_test"):  # a test that fails, fails
        run(ctest, "--test-dir", "out", cwd=toy)


# ---- sdist and wheel, of the real sources ------------------------------------------------------------------------------


def tracked_files() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout to know which files there should be")
    return set(run("git", "ls-files", cwd=ROOT).split())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ".", cwd=ROOT)
    [archive] = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.mark.slow
def test_sdist_holds_every_tracked_file(sdist: Path) -> None:
    held = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    not_for_users = {".gitignore", ".pre-commit-config.yaml", ".ci/run"}
    assert tracked_files() - held - not_for_users == set()
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc")) or "_build_info" in name]


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_works(sdist: Path, tmp_path: Path) -> None:
    # The CPU half alone: the CUDA sources are in the sdist and take two minutes, which continuous integration spends once.
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist)
    run(*command, cwd=tmp_path, LOCALSGD_CUDA="0")
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = [n for n in archive.namelist() if ".dist-info/" not in n]
        archive.extractall(tmp_path / "clean")
    packages = {"localsgd_ext", "localsgd_ext/train"}
    assert {str(Path(name).parent) for name in held} == packages
    assert {Path(n).suffix for n in held} <= {".py", ".pyi", ".so", ".json", ".typed"}, held
    for name in ("py.typed", "_C.pyi", "_build_info.json", "ops.py"):
        assert f"localsgd_ext/{name}" in held
    expected = {n for n in tracked_files() if str(Path(n).parent) in packages}
    assert expected <= set(held)

    # Outside the source tree, where an editable install of this environment must not stand in.
    code = (
        "import torch, localsgd_ext, localsgd_ext.ops as ops; print(localsgd_ext.__file__, ops.is_compiled());"
        "w = torch.eye(3); ops.hebbian_update_(w, torch.ones(2, 3), torch.ones(2, 3), 3.0); print(w.sum().item())"
    )
    said = run(sys.executable, "-W", "error::RuntimeWarning", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "clean"))
    assert said.split() == [str(tmp_path / "clean" / "localsgd_ext" / "__init__.py"), "True", "12.0"]
