from __future__ import annotations

import ast
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import localsgd_ext
from localsgd_ext.train import checkpoint

RUN = {"model": "small_resnet", "lr": 0.1}


def _save(directory: Path, epoch: int) -> Path:
    return checkpoint.save(directory, epoch, RUN, {"weight": torch.full((3,), float(epoch)), "step": epoch})


def test_round_trip(tmp_path: Path) -> None:
    epoch, state = checkpoint.load(_save(tmp_path, 7), RUN)
    assert epoch == 7
    assert torch.equal(state["weight"], torch.full((3,), 7.0))


def test_the_last_two_are_kept_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    for epoch in (1, 2, 9, 10):
        _save(tmp_path, epoch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-0009.ckpt", "checkpoint-0010.ckpt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(tmp_path, 1)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 1, RUN, {"weight": torch.zeros(1000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _truncated(good: bytes) -> bytes:
    return good[: len(good) // 2]


def _header_alone(good: bytes) -> bytes:
    return good[:30]


def _bit_flipped(good: bytes) -> bytes:
    spoilt = bytearray(good)
    spoilt[len(good) // 2] ^= 1
    return bytes(spoilt)


def _empty(good: bytes) -> bytes:
    return b""


def _plain_torch_save(good: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, buffer)
    return buffer.getvalue()


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("code in a checkpoint was run",))


def _with_header(payload: bytes) -> bytes:
    return checkpoint._MAGIC + hashlib.sha256(payload).digest() + payload


def _pickle_with_code(good: bytes) -> bytes:
    return _with_header(pickle.dumps(_Code(), protocol=2))


def _archive_with_code(good: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 2, "identity": RUN, "state": _Code()}, buffer)
    return _with_header(buffer.getvalue())


def _other_content(good: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save([1, 2, 3], buffer)
    return _with_header(buffer.getvalue())


def _of_another_run(good: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({"epoch": 2, "identity": {"model": "vgg13", "lr": 0.1}, "state": {}}, buffer)
    return _with_header(buffer.getvalue())


FAULTS = [
    (_truncated, "is damaged: .* bytes do not match their checksum"),
    (_header_alone, "is damaged"),
    (_bit_flipped, "is damaged"),
    (_empty, "is not a checkpoint of this program"),
    (_plain_torch_save, "is not a checkpoint of this program"),
    (_pickle_with_code, "holds something else than a checkpoint's tensors and numbers"),
    (_archive_with_code, "holds something else than a checkpoint's tensors and numbers"),
    (_other_content, "holds something else than a checkpoint's tensors and numbers"),
    (_of_another_run, "is of another run: model 'vgg13' instead of 'small_resnet'"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_checkpoint_is_named_and_the_one_before_it_used(fault: Any, message: str, tmp_path: Path) -> None:
    _save(tmp_path, 1)
    bad = _save(tmp_path, 2)
    bad.write_bytes(fault(bad.read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match=message) as caught:
        checkpoint.load(bad, RUN)
    assert str(bad) in str(caught.value)

    log: list[str] = []
    found = checkpoint.load_latest(tmp_path, RUN, log.append)
    assert found is not None
    assert found[0] == 1
    assert log == [f"{caught.value}; trying the checkpoint before it"]


def test_no_usable_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path, RUN, print) is None
    for epoch in (1, 2):
        path = _save(tmp_path, epoch)
        path.write_bytes(_truncated(path.read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint can be used: .*0002.*; .*0001"):
        checkpoint.load_latest(tmp_path, RUN, lambda line: None)


def test_the_package_loads_tensors_and_arrays_alone() -> None:
    """Every ``torch.load`` and ``numpy.load`` says that it reads no pickles; ruff's S rules forbid the other ways to run code."""
    required = {"torch": ("weights_only", True), "np": ("allow_pickle", False)}
    found = []
    for path in Path(localsgd_ext.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load"):
                name, value = required[ast.unparse(node.func).split(".")[0]]
                given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert given.get(name) is value, f"{path}, line {node.lineno}"
                found.append(path.name)
    assert sorted(found) == ["checkpoint.py", "glyphs.py"]
