"""Results on disk: one JSON file, written whole after every row, so that a killed run can go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from localsgd_ext.train.files import read_json, write_json

# Rows may be mixed in one file only if these agree.
MUST_AGREE = ("torch", "cpu", "threads", "gpu", "cuda", "cudnn", "git_commit", "compiled_kernels", "clock")


class Records:
    """Rows by key, beside what they were measured on. ``path=None`` keeps them in memory."""

    def __init__(
        self, path: Path | None, header: Mapping[str, Any], *, resume: bool = False, must_agree: Iterable[str] = MUST_AGREE
    ) -> None:
        """Raises ``ValueError`` if ``path`` exists and ``resume`` is off, or holds what was measured on something else."""
        self.path = path
        self.begin = self._saved = time.monotonic()
        self.left: list[str] = []
        self.content: dict[str, Any] = {**header, "rows": {}}
        if path is None:
            return
        if path.exists():
            if not resume:
                raise ValueError(f"{path} exists: --resume goes on with it, another --out leaves it alone")
            before = read_json(path)
            old, new = before.get("environment", {}), header.get("environment", {})
            for key in must_agree:
                if old.get(key) != new.get(key):
                    raise ValueError(f"{path} was measured with {key} {old.get(key)!r}, this is {new.get(key)!r}")
            self.content["rows"] = before["rows"]
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.content["rows"]  # type: ignore[no-any-return]

    def done(self, key: str) -> bool:
        """Whether there is a good row; what failed is tried again."""
        return key in self.rows and self.rows[key]["status"] == "ok"

    def todo(self, keys: Iterable[str], budget: float | None = None) -> Iterator[str]:
        """Those of ``keys`` that are not done, until ``budget`` seconds after these records were opened; ``left`` are the others."""
        self.left = [key for key in keys if not self.done(key)]
        while self.left and (budget is None or time.monotonic() - self.begin <= budget):
            yield self.left.pop(0)

    def add(self, key: str, row: Mapping[str, Any], *, every: float = 0) -> None:
        """On disk at once, or with the first row that comes ``every`` seconds after the file was last written, or by :meth:`save`."""
        self.rows[key] = dict(row)
        if time.monotonic() - self._saved >= every:
            self.save()

    def exit_status(self, planned: Collection[str]) -> int:
        """Of a command whose rows these are: 0: all of ``planned`` are good; 1: one is not; 3: none of them, but some are left."""
        bad = {key for key in planned if key in self.rows and not self.done(key)}
        if self.left:
            print(f"{len(planned) - len(self.left)} of {len(planned)} done: go on with --resume", file=sys.stderr)
            return 1 if bad - set(self.left) else 3
        return int(bool(bad))

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)
        self._saved = time.monotonic()


def exit_status(work: Callable[[], Records | int | None]) -> int:
    """Of a command that does ``work``: 0: done; 2: wrong arguments or file, said on standard error; 3: rows are left; or what it returns."""
    try:
        records = work()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if isinstance(records, int):
        return records
    if records and records.left:
        print(f"{len(records.left)} runs are left: go on with --resume", file=sys.stderr)
        return 3
    return 0


def show(path: Path, report: Callable[[Any], str]) -> int:
    """Prints the tables of a results file; returns exit status 0."""
    print(report(read_json(path)), end="")
    return 0
