"""Writing files so that a crash at any moment leaves either the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a temporary file beside it, flushed to disk, then renamed.

    Raises:
        OSError: naming ``path``, which then holds what it held before (full disk, no permission).
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from a colleague
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(directory)  # the rename itself must reach the disk
    finally:
        os.close(directory)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An ``OSError`` raised inside names ``path``: that of a write or a flush names no file by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def unfinished(directory: Path) -> list[Path]:
    """Temporary files that a killed :func:`write_atomically` left in ``directory``."""
    return list(directory.glob(".*.*.tmp"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ``ValueError`` naming the file if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one line of JSON and flush it to disk."""
    with naming(path), path.open("a") as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines, atomically."""
    write_atomically(path, "".join(json.dumps(value) + "\n" for value in values).encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line cut short by a crash is left out. Raises ``ValueError`` on any other fault."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values.append(json.loads(line.decode()))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            if number == len(lines):  # no newline after it: the write was cut
                break
            raise ValueError(f"{path}, line {number}, is not valid JSON: {error}") from None
    return values
