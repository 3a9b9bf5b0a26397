"""Full disks, directories that cannot be written to, a second process: clear errors, and nothing that was there is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from same_runs import assert_same_run

from localsgd_ext.__main__ import main
from localsgd_ext.train import data, rundir
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.loop import Trainer
from localsgd_ext.train.progress import Lines


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "tensorboard" not in file.parts}


def go_on(config: RunConfig, path: Path) -> None:
    """What a user does after whatever happened: the same command, with ``--resume`` if the run had begun."""
    resume = (path / rundir.CONFIG).exists()
    directory = rundir.RunDirectory(path, config, resume=resume)
    try:
        trainer = Trainer(config, data.load(config), directory, Lines(1, write=lambda line: None))
        if resume:
            trainer.restore()
        while not trainer.done:
            trainer.run_epoch()
        trainer.finish()
    finally:
        directory.close()


class FullDisk:
    """Lets ``room`` more flushes to disk succeed and fails the next, like a disk that another program has filled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.flushes = 0
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.flushes += 1
        if self.room is not None:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1
        self._fsync(descriptor)


def test_a_disk_that_is_full_at_any_write(
    tmp_path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write fails, the error names the file, the files before it are whole, and the run goes on to the same end."""
    config = tiny("local", epochs=2, alpha=9.0)
    disk = FullDisk(monkeypatch)
    go_on(config, tmp_path / "undisturbed")
    writes = disk.flushes
    assert writes > 12
    for room in range(writes):
        run = tmp_path / str(room)
        disk.room = room
        with pytest.raises(OSError, match="No space left on device") as caught:
            go_on(config, run)
        assert Path(caught.value.filename).parent == run
        before = contents(run)
        with pytest.raises(OSError, match="No space left on device"):  # still full: nothing is overwritten
            go_on(config, run)
        after = contents(run)
        for name in (rundir.METRICS, rundir.CONFIG, *(path.name for path in run.glob("*.ckpt"))):
            assert after.get(run / name) == before.get(run / name), (room, name)
        disk.room = None
        go_on(config, run)
        assert_same_run(tmp_path / "undisturbed", run)


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_command_line_says_in_one_message_what_could_not_be_written(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The system itself refuses the write here: no file may be as large as a checkpoint."""
    out = tmp_path / "run"
    options = [*tiny_flags, "--method", "sgd", "--epochs", "2"]
    with _largest_file(20_000):
        assert main(["train", *options, "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"Error: File too large: {out / 'checkpoint-0001.ckpt'}. What was saved before is whole")
    assert f"continue with --resume --out {out}" in shown
    assert "Traceback" not in shown
    assert not list(out.glob("*.ckpt"))
    assert not list(out.glob("*.tmp"))
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert main(["train", *options, "--out", str(tmp_path / "undisturbed")]) == 0
    assert_same_run(tmp_path / "undisturbed", out)


@contextlib.contextmanager
def _ordinary_user() -> Iterator[None]:
    """The superuser may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_cannot_be_written_to(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a directory that is its owner's alone
        shelf, run = Path(name), Path(name) / "run"
        assert main(["train", *tiny_flags, "--method", "sgd", "--epochs", "1", "--out", str(run)]) == 0
        capsys.readouterr()
        before = contents(shelf)
        for folder in (shelf, run):
            folder.chmod(0o555)
        (run / rundir.LOCK).chmod(0o444)
        with _ordinary_user():
            assert main(["train", "--resume", "--out", str(run)]) == 2
            assert capsys.readouterr().err == f"Error: Permission denied: {run / rundir.LOCK}\n"
            assert main(["train", *tiny_flags, "--out", str(shelf / "new")]) == 2
            assert capsys.readouterr().err == f"Error: Permission denied: {shelf / 'new'}\n"
            assert main(["compare", *tiny_flags, "--out", str(shelf / "new")]) == 2
            assert capsys.readouterr().err == f"Error: Permission denied: {shelf / 'new'}\n"
        for folder in (shelf, run):
            folder.chmod(0o755)
        assert contents(shelf) == before


@contextlib.contextmanager
def _locked_by_another_process(path: Path) -> Iterator[int]:
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            rundir.lock(path)
            os.write(done, b"locked")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(done)
        assert os.read(ready, 10) == b"locked"
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("what", ["run", "comparison", "run of a comparison"])
def test_a_second_process_in_the_same_directory_is_refused(
    what: str, tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command, method = ("train", "--method") if what == "run" else ("compare", "--methods")
    assert main([command, *tiny_flags, method, "sgd", "--epochs", "1", "--out", str(out)]) == 0
    locked = out
    if what == "run of a comparison":
        locked = out / "sgd-seed0"
        (locked / rundir.SUMMARY).unlink()  # so that there is something left to do in it
    before = {path: content for path, content in contents(out).items() if path.name != rundir.LOCK}
    with _locked_by_another_process(locked) as process:
        capsys.readouterr()
        assert main([command, "--resume", "--out", str(out)]) == 2
        shown = capsys.readouterr().err
        assert f"Error: {locked} is in use by process {process} on " in shown
        assert "Traceback" not in shown
        assert {path: content for path, content in contents(out).items() if path.name != rundir.LOCK} == before
    assert main([command, "--resume", "--out", str(out)]) == 0  # the lock went with the process that held it


def test_a_directory_in_which_only_a_lock_was_left_can_be_used(tmp_path: Path, tiny: Callable[..., RunConfig]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    os.close(rundir.lock(run))
    rundir.RunDirectory(run, tiny("sgd"), resume=False).close()
    with pytest.raises(ValueError, match="exists and is not empty"):
        rundir.RunDirectory(run, tiny("sgd"), resume=False)


def test_a_run_none_of_whose_checkpoints_is_whole(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit in one and an end cut off the other: both are named, and nothing is trained over them."""
    out = tmp_path / "run"
    assert main(["train", *tiny_flags, "--method", "sgd", "--epochs", "2", "--out", str(out)]) == 0
    flipped, cut = sorted(out.glob("*.ckpt"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 3] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    capsys.readouterr()
    before = contents(out)
    assert main(["train", "--resume", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"Error: no checkpoint can be used: {cut} is damaged: " in shown
    assert f"; {flipped} is damaged: " in shown
    assert "Traceback" not in shown
    after = contents(out)
    noted = {out / name for name in (rundir.LOG, rundir.LOCK, rundir.ENVIRONMENT)}  # when and where it was tried
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} <= noted
    assert after[out / rundir.LOG].startswith(before[out / rundir.LOG])
