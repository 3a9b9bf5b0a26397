"""How many random layers tests/test_ops_fuzz.py tried, of what: from the process that ran them to the one that prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_FILE = Path(__file__).resolve().parents[1] / "build" / "fuzz_coverage.json"


def forget() -> None:
    _FILE.unlink(missing_ok=True)


def save(counts: Mapping[str, int]) -> None:
    _FILE.parent.mkdir(exist_ok=True)
    _FILE.write_text(json.dumps(dict(sorted(counts.items()))))


def lines() -> list[str]:
    if not _FILE.exists():
        return []
    counts = json.loads(_FILE.read_text())
    return ["random layers on the CPU:", *(f"{count:7d}  {what}" for what, count in counts.items())]
