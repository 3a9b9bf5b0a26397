"""Small runs that take a second, and a cache of their own for the glyphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import TINY

from localsgd_ext.train import data
from localsgd_ext.train.config import RunConfig, resolve
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Lines
from localsgd_ext.train.rundir import RunDirectory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALSGD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny() -> Callable[..., RunConfig]:
    """``tiny(method, **changes)``: a run on fake pictures that takes a second."""
    return lambda method="local", **changes: resolve("fake", "small_resnet", method, **{**TINY, "device": "cpu", **changes})


@pytest.fixture
def tiny_flags() -> list[str]:
    """The same as options of the command line."""
    options = [("--data", "fake"), ("--model", "small_resnet"), ("--device", "cpu")]
    options += [(f"--{name.replace('_', '-')}", str(value)) for name, value in TINY.items()]
    return [word for option in options for word in option]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """``trainer(config, name, resume=False)``: a trainer in ``tmp_path / name``."""

    def make(config: RunConfig, name: str = "run", resume: bool = False) -> Trainer:
        directory = RunDirectory(tmp_path / name, config, resume=resume)
        made = Trainer(config, data.load(config), directory, Lines(1, write=lambda line: None))
        if resume:
            made.restore()
        return made

    return make


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes of 12 training and 7 test pictures, each of one colour."""
    for split, count in (("train", 12), ("val", 7)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 12), (20 * i, 9, 120 if name == "dog" else 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path
