"""How many random layers tests/test_ops_fuzz.py tried, of what: from the process that ran them to the one that prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

_FILE = Path(__file__).resolve().parents[1] / "build" / "fuzz_coverage.json"


def forget() -> None:
    _FILE.unlink(missing_ok=True)


def save(counts: Mapping[str, int]) -> None:
    """Keys are ``algorithm|aspect|value``; one without ``|`` is a line of its own."""
    _FILE.parent.mkdir(exist_ok=True)
    _FILE.write_text(json.dumps(dict(sorted(counts.items()))))


def lines() -> list[str]:
    if not _FILE.exists():
        return []
    counts = json.loads(_FILE.read_text())
    by_aspect = groupby(counts, key=lambda key: key.rpartition("|")[0])
    shown = (
        f"  {aspect.replace('|', ', ')}: " + ", ".join(f"{key.rpartition('|')[2]} {counts[key]}" for key in keys)
        for aspect, keys in by_aspect
        if aspect
    )
    whole = [f"{count} {key}" for key, count in counts.items() if "|" not in key]
    return [f"random layers on the CPU: {', '.join(whole)}", *shown]
