"""Checkpoints that a crash cannot half-write and that are checked before a byte of them is believed.

A file is a header (format id, SHA-256 of the rest) and a ``torch.save`` archive, which is read with ``weights_only=True``:
a file from a stranger can be wrong, but it cannot run code.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from localsgd_ext.train.files import write_atomically

_MAGIC = b"localsgd-checkpoint 1\n"
_DIGEST = hashlib.sha256().digest_size
_NAME = re.compile(r"checkpoint-(\d{4,})\.ckpt")
KEEP = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and says why."""


def path_of(directory: Path, epoch: int) -> Path:
    """Where the state after ``epoch`` finished epochs is kept."""
    return directory / f"checkpoint-{epoch:04d}.ckpt"


def existing(directory: Path) -> list[Path]:
    """The checkpoints of a run directory, newest first."""
    found = [(int(m[1]), path) for path in directory.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def save(directory: Path, epoch: int, identity: dict[str, Any], state: dict[str, Any]) -> Path:
    """Write the state after ``epoch`` finished epochs and drop all but the last ``KEEP`` checkpoints.

    Args:
        identity: what makes the run this run (its configuration); a resumed run must have the same.
        state: tensors, numbers, strings and containers of them.
    """
    buffer = io.BytesIO()
    torch.save({"epoch": epoch, "identity": identity, "state": state}, buffer)
    payload = buffer.getvalue()
    path = path_of(directory, epoch)
    write_atomically(path, _MAGIC + hashlib.sha256(payload).digest() + payload)
    for old in existing(directory)[KEEP:]:
        old.unlink()
    return path


def load(
    path: Path, identity: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint of the run described by ``identity``: finished epochs and state, tensors on the CPU.

    Args:
        defaults: what holds for names of ``identity`` that the file does not know: options that are newer than it.
    Raises:
        CheckpointError: not a checkpoint, damaged, of another format, or of another run.
    """
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this program (wrong format id)")
    digest, payload = content[len(_MAGIC) : len(_MAGIC) + _DIGEST], content[len(_MAGIC) + _DIGEST :]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path} is damaged: {len(content)} bytes do not match their checksum")
    try:
        saved = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        found_identity, epoch, state = saved["identity"], saved["epoch"], saved["state"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} holds something else than a checkpoint's tensors and numbers: {reason}") from None
    theirs = found_identity if isinstance(found_identity, dict) else {}
    theirs = {name: defaults[name] for name in defaults.keys() & identity.keys()} | theirs if theirs else {}
    if theirs != identity:
        differing = sorted(k for k in theirs.keys() | identity.keys() if theirs.get(k) != identity.get(k))
        named = ", ".join(f"{k} {theirs.get(k)!r} instead of {identity.get(k)!r}" for k in differing)
        raise CheckpointError(f"{path} is of another run: {named}")
    return epoch, state


def load_latest(
    directory: Path, identity: dict[str, Any], log: Callable[[str], None], defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[int, dict[str, Any]] | None:
    """The newest usable checkpoint, ``None`` if there are none; one that cannot be used is reported and the one before it tried.

    Arguments and errors as :func:`load`.

    Raises:
        CheckpointError: there are checkpoints and none can be used.
    """
    paths = existing(directory)
    problems = []
    for path in paths:
        try:
            return load(path, identity, defaults)
        except CheckpointError as error:
            log(f"{error}; trying the checkpoint before it")
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(problems))
    return None
