"""The tables of benchmarks/study.py, from a results file alone."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import aligned


def report(content: dict[str, Any]) -> str:
    """Test accuracy after the last epoch, by run."""
    rows = [("run", "accuracy, %")]
    rows += [(key, f"{100 * row['epochs'][-1]['accuracy']:.1f}") for key, row in content["rows"].items()]
    return aligned(rows) + "\n"
