from __future__ import annotations

import sys
from pathlib import Path

import pytest

from localsgd_ext import __main__ as entry
from localsgd_ext.__main__ import main
from localsgd_ext.train import cli


def test_train_says_what_it_does_and_where_things_are(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *tiny_flags, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 4  # not a terminal: one line per epoch
    for part in ("epoch 4/4", "accuracy", "prefix 2/14", "images/s", "left 0 s"):
        assert part in lines[-1]
    assert f"Everything is in {out}" in shown
    assert (out / "picture.png").exists()

    # Finished: resuming it trains nothing and shows the table again.
    before = (out / "model.pt").read_bytes()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "resuming after epoch 4 of 4" in capsys.readouterr().out
    assert (out / "model.pt").read_bytes() == before


@pytest.mark.parametrize(("options", "method"), [([], "freeze"), (["--preset", "paper"], "local")])
def test_the_default_method_is_the_preset_s(options: list[str], method: str, tmp_path: Path) -> None:
    """Nothing is trained: the CIFAR archives are not there."""
    out = tmp_path / "run"
    flags = ["--data", "cifar10", "--model", "resnet18", "--root", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        resolved: list[str] = []
        patch.setattr(cli, "_check_machine", lambda config: resolved.append(config.method))
        assert main(["train", *flags, *options, "--out", str(out)]) == 2
    assert resolved == [method]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train"], "--data is required"),
        (["train", "--data", "mnist", "--model", "vgg13"], "--data must be one of digits, glyphs, cifar10"),
        (["train", "--data", "fake", "--model", "lenet"], "--model must be one of small_resnet"),
        (
            ["train", "--data", "fake", "--model", "vgg13", "--method", "hebb"],
            "--method must be one of sgd, freeze, refresh, local",
        ),
        (["train", "--data", "fake", "--model", "vgg13", "--t-shift", "far"], "--t-shift must be auto, a number of layers"),
        (
            ["train", "--data", "fake", "--model", "vgg13", "--preset", "paper"],
            "--preset paper has no values for vgg13 on fake",
        ),
        (["train", "--data", "fake", "--model", "vgg13", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["train", "--data", "fake", "--model", "vgg13", "--device", "abacus"], "--device abacus cannot be used here"),
        (
            ["train", "--data", "cifar10", "--model", "vgg13", "--root", "/nowhere"],
            "batches.meta is missing; download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
        (
            ["train", "--data", "fake", "--model", "vgg13", "--memory-budget", "10 G"],
            "--memory-budget must be a number of bytes",
        ),
        (
            ["train", "--data", "fake", "--model", "vgg13", "--method", "local", "--sync", "epoch"],
            "--sync epoch needs several processes, started by torchrun, got one",
        ),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--resume", "--out", "/nowhere"], "--resume: there is no run in /nowhere"),
        (["compare", "--data", "fake", "--model", "vgg13", "--methods", "sgd,adam"], "--methods must be among sgd, freeze"),
        (["compare", "--data", "fake", "--model", "vgg13", "--methods", "sgd,sgd"], "--methods names a method twice"),
        (["compare", "--data", "fake", "--model", "vgg13", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "--resume", "--out", "/nowhere"], "--resume: there is no comparison in /nowhere"),
        (["report", "/nowhere"], "/nowhere is not a run directory (no config.json)"),
    ],
)
def test_mistakes_end_in_one_message(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Error: ")
    assert message in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []  # nothing is left behind that would be in the way of the next attempt


def test_nothing_is_overwritten(tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.tex").write_text("precious")
    for command in ("train", "compare"):
        assert main([command, *tiny_flags, "--out", str(out)]) == 2
        assert f"--out {out} exists and is not empty: choose another directory" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["chapter1.tex"]


def test_resuming_with_other_options_is_refused(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *tiny_flags, "--epochs", "1", "--method", "sgd", "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["train", "--resume", "--out", str(out), "--lr", "0.5", "--epochs", "9", "--method", "local"]) == 2
    shown = capsys.readouterr().err
    assert "was started with other options: --method: sgd -> local; --epochs: 1 -> 9; --lr: 0.02 -> 0.5" in shown
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(["train", "--resume", "--out", str(out), "--workers", "1"]) == 0  # this does not change what is computed


def test_a_damaged_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"data": "fake"')
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert "config.json is not valid JSON" in capsys.readouterr().err


def test_without_the_extra_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = entry.importlib.util.find_spec
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None if name in ("typer", "rich") else found(name))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "localsgd needs typer, rich: pip install 'localsgd_ext[train]'\n"


@pytest.mark.parametrize("command", ["train --method prunetrain", "compare --methods sgd,prunetrain"])
def test_only_prunetrain_needs_torch_pruning(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = entry.importlib.util.find_spec
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None if name == "torch_pruning" else found(name))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # importing it now raises
    options = ["--data=fake", "--device=cpu", "--epochs=1", "--train-size=64", "--test-size=32", "--image-size=16"]
    assert main([*command.split(), *options, "--out", str(tmp_path / "pruned")]) == 2
    assert "--method prunetrain needs torch_pruning: pip install torch-pruning" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()
    assert main(["train", "--method", "sgd", *options, "--out", str(tmp_path / "sgd")]) == 0


def test_doctor_needs_neither_typer_nor_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("typer", "rich", "torchvision", "tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises
    for name in [name for name in sys.modules if name.startswith("localsgd_ext.train")]:
        monkeypatch.delitem(sys.modules, name)
    from localsgd_ext import doctor

    asked: list[list[str]] = []
    monkeypatch.setattr(doctor, "main", lambda argv: asked.append(argv) or 7)
    assert main(["doctor", "--some-option"]) == 7
    assert asked == [["--some-option"]]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("train", "compare", "report", "doctor"):
        assert command in shown
