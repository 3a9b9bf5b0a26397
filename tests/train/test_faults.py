"""Full disks, directories that cannot be written to, a second process: clear errors, and nothing that was there is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from same_runs import assert_same_run

from localsgd_ext.__main__ import main
from localsgd_ext.train import picture, report, rundir
from localsgd_ext.train.config import RunConfig
from localsgd_ext.train.files import read_json, write_json


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "tensorboard" not in file.parts}


def go_on(options: list[str], path: Path) -> int:
    """What a user does after whatever happened: the same command, with ``--resume`` if the run had begun. Its exit status."""
    command = ["train", "--resume"] if (path / rundir.CONFIG).exists() else ["train", *options]
    return main([*command, "--out", str(path)])


class FullDisk:
    """Lets ``room`` more writes and flushes under ``root`` succeed and no later one, like a disk that another program has filled.

    The last write that gets some room gets half of what it asks for. Flushes need room and do nothing: nothing crashes here.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.writes: list[str] = []
        """Names of the files written to, or "flush"."""
        self._root, self._halved = str(root), False
        self._open, self._pwrite = io.open, os.pwrite
        monkeypatch.setattr(io, "open", self._opened)
        monkeypatch.setattr(os, "fsync", lambda descriptor: self.take("flush"))
        monkeypatch.setattr(os, "pwrite", lambda *arguments: (self.take("lock"), self._pwrite(*arguments)))

    def fill(self, room: int | None) -> None:
        self.room, self._halved = room, False

    def take(self, name: str) -> None:
        self.writes.append(name)
        if self.room is not None:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1

    def of(self, name: str, count: int) -> int:
        """How many of ``count`` bytes a write may have."""
        if self.room == 0 and not self._halved and count > 1:
            self._halved = True
            return count // 2
        self.take(name)
        return count

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not set(mode) & set("wax+") or not (isinstance(file, int) or str(file).startswith(self._root)):
            return self._open(file, mode, buffering, *rest, **more)
        buffered = io.BufferedWriter(_OnFullDisk(self, file, mode.replace("b", "").replace("t", "")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered)


class _OnFullDisk(io.FileIO):
    def __init__(self, disk: FullDisk, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._disk = disk

    def write(self, content: Any) -> int:
        return super().write(content[: self._disk.of(str(self.name), len(content))])


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    """Pictures are drawn quickly: what matters is that they are written."""
    monkeypatch.setattr(picture, "draw", lambda runs, title: {"png": b"a picture", "svg": b"another"})
    return FullDisk(tmp_path, monkeypatch)


def test_a_disk_that_is_full_at_any_write(
    tmp_path: Path, tiny_flags: list[str], disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever write fails, one message names the file, the files before it are whole, and the run goes on to the same end."""
    options = [*tiny_flags, "--method", "local", "--epochs", "2", "--train-size", "32", "--test-size", "20"]
    assert go_on(options, tmp_path / "undisturbed") == 0
    writes = list(disk.writes)
    for name in (rundir.LOG, "tensorboard"):
        assert any(name in write for write in writes)
    assert len(writes) > 40
    for room in range(len(writes)):
        run = tmp_path / str(room)
        disk.fill(room)
        capsys.readouterr()
        assert go_on(options, run) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"Error: No space left on device: {run}{os.sep}"), (room, shown)
        assert len(shown.splitlines()) == 1
        before = contents(run)
        disk.fill(room % 5)  # still as good as full: nothing is overwritten
        assert go_on(options, run) == 2
        after = contents(run)
        for name in (rundir.METRICS, rundir.CONFIG, "model.pt", *(path.name for path in run.glob("*.ckpt"))):
            assert after.get(run / name) == before.get(run / name), (room, name)
        disk.fill(None)
        assert go_on(options, run) == 0
        assert_same_run(tmp_path / "undisturbed", run)
        assert {path.relative_to(run) for path in contents(run)} == {
            path.relative_to(tmp_path / "undisturbed") for path in contents(tmp_path / "undisturbed")
        }
        shutil.rmtree(run)


@pytest.mark.parametrize("command", ["train", "compare", "report"])
def test_a_disk_that_is_full_after_the_last_epoch(
    command: str,
    tmp_path: Path,
    tiny_flags: list[str],
    disk: FullDisk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, write = tmp_path / "run", report.write
    method = ["--methods", "sgd"] if command == "compare" else ["--method", "sgd"]
    options = [*tiny_flags, *method, "--epochs", "1", "--out", str(out)]
    monkeypatch.setattr(report, "write", lambda runs, path: (disk.fill(0), write(runs, path))[1])
    if command == "report":
        assert main(["train", *options]) == 2
        assert main(["report", str(out)]) == 2
    else:
        assert main([command, *options]) == 2
        assert f"continue with --resume --out {out}" in capsys.readouterr().err
        disk.fill(None)
        assert main([command, "--resume", "--out", str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"Error: No space left on device: {out / 'table.json'}" in shown
    assert "Traceback" not in shown
    disk.fill(None)
    monkeypatch.setattr(report, "write", write)
    assert main(["report", str(out)]) == 0
    assert (out / "picture.png").read_bytes() == b"a picture"


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    number: int, tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on: nobody is kept out, which is said."""

    def refused(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refused)
    run, both = tmp_path / "run", tmp_path / "both"
    said = f"a second process is not kept out of {run}: its file system refuses locks ({os.strerror(number)})"
    with pytest.warns(UserWarning, match="refuses locks"):
        assert main(["train", *tiny_flags, "--epochs", "1", "--out", str(run)]) == 0
    assert f" warning: {said}\n" in (run / rundir.LOG).read_text()
    with pytest.warns(UserWarning, match="refuses locks"):
        assert main(["train", "--resume", "--out", str(run)]) == 0
    assert (run / rundir.LOG).read_text().count(said) == 2
    with pytest.warns(UserWarning, match="refuses locks"):
        assert main(["compare", *tiny_flags, "--methods", "sgd", "--epochs", "1", "--out", str(both)]) == 0


def test_a_lock_that_fails_otherwise_is_an_error(
    tmp_path: Path, tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", failing)
    assert main(["train", *tiny_flags, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"Error: Input/output error: {tmp_path / 'run' / rundir.LOCK}\n"


@pytest.mark.parametrize("damage", [b"\xff", b"}"])
def test_damaged_metrics(damage: bytes, tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No text any more, or no JSON."""
    train, compare = tmp_path / "run", tmp_path / "both"
    assert main(["train", *tiny_flags, "--method", "sgd", "--epochs", "2", "--out", str(train)]) == 0
    assert main(["compare", *tiny_flags, "--methods", "sgd", "--epochs", "2", "--out", str(compare)]) == 0
    (compare / "sgd-seed0" / rundir.SUMMARY).unlink()  # so that there is something left to do in it
    for file in (train / rundir.METRICS, compare / "sgd-seed0" / rundir.METRICS):
        file.write_bytes(file.read_bytes()[:40] + damage + file.read_bytes()[41:])
    for command, file in (
        (["train", "--resume", "--out", str(train)], train / rundir.METRICS),
        (["report", str(train)], train / rundir.METRICS),
        (["compare", "--resume", "--out", str(compare)], compare / "sgd-seed0" / rundir.METRICS),
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"Error: {file}, line 1, is not valid JSON: ")


def test_any_bit_of_the_metrics_flipped(tmp_path: Path, tiny_flags: list[str]) -> None:
    """A run either goes by what it reads or says what is wrong with the file."""
    assert main(["train", *tiny_flags, "--method", "sgd", "--epochs", "1", "--out", str(tmp_path)]) == 0
    file = tmp_path / rundir.METRICS
    content = file.read_bytes()
    refused = 0
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with contextlib.suppress(ValueError):
            report.summarize([report.read_run(tmp_path)])
            continue
        refused += 1
    assert refused > len(content)


def test_a_run_of_a_comparison_that_cannot_be_gone_on_with(
    tmp_path: Path, tiny_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *tiny_flags, "--methods", "sgd", "--epochs", "1", "--out", str(tmp_path)]) == 0
    run = tmp_path / "sgd-seed0"
    (run / rundir.SUMMARY).unlink()
    write_json(run / rundir.CONFIG, read_json(run / rundir.CONFIG) | {"lr": 0.5})
    capsys.readouterr()
    assert main(["compare", "--resume", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"Error: --resume: the run in {run} was started with other options: ")


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
