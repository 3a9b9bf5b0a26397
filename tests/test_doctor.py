"""`localsgd doctor`: what it finds, what it says is missing, and that its self-test can fail."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
from importlib import machinery
from pathlib import Path

import pytest
import torch

from localsgd_ext import doctor, ops, reference

PACKAGE = Path(doctor.__file__).parent


def report_of(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = doctor.main([])
    return code, capsys.readouterr().out


def test_everything_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = report_of(capsys)
    assert code == 0
    assert "FAILED" not in out
    assert torch.__version__ in out
    assert out.rstrip().endswith("Everything that is here works.")


def test_every_operation_and_algorithm_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = report_of(capsys)
    for dtype in ("float32", "bfloat16"):
        for algorithm in reference.ALGORITHMS:
            assert re.search(rf"correlation {algorithm} +{dtype} +\d+ shapes? .* ok", out)
        for op in ("hebbian_update_", r"hebbian_update_ \(zero norm\)", "apply_update_"):
            assert re.search(rf"{op} +{dtype} +\d+ shapes .* ok", out)


def test_a_wrong_kernel_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.correlation
    monkeypatch.setattr(ops, "correlation", lambda *args, **kw: 1.001 * right(*args, **kw))
    code, out = report_of(capsys)
    assert code == 1
    assert "FAILED: correlation library on conv2d 3x3, float32, cpu: error 1.0e-03" in out
    assert "Some checks FAILED." in out


def test_nan_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "correlation", lambda x, z, weight, **_: torch.full_like(weight, torch.nan))
    code, out = report_of(capsys)
    assert code == 1
    assert re.search(r"correlation auto +float32 +8 shapes +nan +FAILED", out)


def test_a_kernel_that_raises_is_named_and_the_report_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_kw: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "apply_update_", broken)
    code, out = report_of(capsys)
    assert code == 1
    assert "FAILED: apply_update_ on linear, float32, cpu: RuntimeError: no such kernel" in out
    assert re.search(r"hebbian_update_ +bfloat16 .* ok", out)


def test_an_update_that_is_not_skipped_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.hebbian_update_

    def uncounted(*args: object, skipped: torch.Tensor | None = None, **kw: object) -> None:
        right(*args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "hebbian_update_", uncounted)
    code, out = report_of(capsys)
    assert code == 1
    assert re.search(r"hebbian_update_ \(zero norm\) float32 +8 shapes +inf +FAILED", out)
    assert re.search(r"hebbian_update_ +float32 .* ok", out)


def test_tf32_is_off_during_the_self_test_and_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(doctor, "_self_test_device", lambda *_: seen.append(torch.backends.cuda.matmul.allow_tf32))
    torch.backends.cuda.matmul.allow_tf32 = True
    doctor.report_self_test(doctor.Report())
    assert seen[0] is False
    assert torch.backends.cuda.matmul.allow_tf32 is True


@pytest.mark.parametrize(
    ("compiled", "capability", "expected"),
    [
        ("sm_75 sm_80", (8, 6), True),  # a binary runs on later minors of its major
        ("sm_75 sm_80", (9, 0), False),
        ("sm_80 compute_80", (9, 0), True),  # PTX is compiled by the driver
        ("sm_86", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False),
        ("compute_90", (8, 0), False),
        ("sm_100 sm_120", (12, 1), True),
        ("", (8, 0), False),
    ],
)
def test_coverage_of_a_gpu(compiled: str, capability: tuple[int, int], expected: bool) -> None:
    assert doctor.covers(compiled.split(), *capability) is expected


def test_missing_compiler_and_nvcc_are_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    code, out = report_of(capsys)
    assert code == 0
    assert "apt install g++" in out
    assert (
        'CUDA kernels cannot be built here: CUDA_HOME=/nowhere: there is no bin/nvcc. To get one: pip install "cuda-toolkit'
        in out
    )


def test_a_cpu_build_of_torch_is_not_told_to_get_nvcc(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    _, out = report_of(capsys)
    assert "built without CUDA" in out
    assert "cuda-toolkit" not in out


def test_missing_packages_of_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.metadata.version
    extra = [f"{name}; extra == 'train'" for name in ("typer>=0.12", "rich", "torch-pruning>=1.6")]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=2.10", *extra])

    def version(name: str) -> str:
        if name in ("typer", "torch-pruning"):
            raise doctor.metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    code, out = report_of(capsys)
    assert code == 0
    assert re.search(r"typer +missing", out)
    assert 'need typer: `pip install "localsgd_ext[train]"`' in out
    assert "need typer, rich" not in out
    assert '`localsgd train --method prunetrain` needs torch-pruning: `pip install "localsgd_ext[train]"`' in out


def test_module_of_another_torch_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    info = {"torch": "2.10.0", "compiler": "g++", "git_commit": "abc", "cuda_arch_list": "sm_80", "nvcc": "13.0"}
    monkeypatch.setattr(doctor, "build_info", lambda: info)
    monkeypatch.setattr(ops, "is_compiled", lambda device="cpu": True)
    monkeypatch.setattr(doctor, "compiled_kernels", lambda _: {"axpy_kernel": ["sm_80"]})
    report = doctor.Report()
    doctor.report_compiled_module(report)
    assert f"was built with torch 2.10.0 but runs with {torch.__version__}: rebuild it" in report.advice[0]
    assert "for sm_80 (nvcc 13.0)" in capsys.readouterr().out


# ---- a source tree without the compiled module -------------------------------------------------------------------------


@pytest.fixture
def bare_tree(tmp_path: Path) -> Path:
    """The package's Python files alone."""
    shutil.copytree(
        PACKAGE, tmp_path / "localsgd_ext", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    return tmp_path


def python(tree: Path, *arguments: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python that sees ``tree``'s package, and the installed ones by path alone.

    Without -S an editable install's finder would supply the missing module from the directory it points to.
    """
    path = [*([first] if first else []), tree, *site.getsitepackages()]
    env = {"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-S", *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_without_the_module_the_package_runs_on_the_reference_and_says_so_once(bare_tree: Path) -> None:
    code = (
        "import torch, localsgd_ext, localsgd_ext.ops as ops\n"
        "assert not ops.is_compiled()\n"
        "for _ in range(3):\n"
        "    w = torch.eye(3); ops.hebbian_update_(w, torch.ones(2, 3), torch.ones(2, 3), 3.0)\n"
        "print(localsgd_ext.__file__, w.sum().item())"
    )
    done = python(bare_tree, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(bare_tree / "localsgd_ext" / "__init__.py"), "12.0"]
    assert done.stderr.count("plain PyTorch reference") == 1
    assert "pip install --no-build-isolation ." in done.stderr


def test_without_the_module_the_doctor_says_how_to_get_it(bare_tree: Path) -> None:
    done = python(bare_tree, "-m", "localsgd_ext.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not loaded: the operations run on the plain PyTorch reference" in done.stdout
    assert "The compiled module is missing. Build it in the source tree: `pip install --no-build-isolation .`" in done.stdout
    assert "Self-test on cpu (PyTorch reference)" in done.stdout


def test_a_module_that_does_not_load_is_not_called_missing(bare_tree: Path) -> None:
    (bare_tree / "localsgd_ext" / f"_C{machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not an ELF file")
    done = python(bare_tree, "-m", "localsgd_ext.doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"_C\..* is there but does not load: .*(invalid ELF header|file too short)", done.stdout)


def test_the_command_line_reaches_the_doctor_without_its_packages(bare_tree: Path) -> None:
    """`localsgd doctor` is for the user who lacks typer and rich."""
    block = bare_tree / "block"
    for name in ("typer", "rich", "matplotlib", "tensorboard"):
        (block / name).mkdir(parents=True)
        (block / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked')")
    done = python(bare_tree, "-m", "localsgd_ext", "doctor", first=block)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Self-test on cpu" in done.stdout
