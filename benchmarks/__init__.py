"""Measurements. A package, so that its modules' names are nobody else's; its programs are files to run."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]  # cases.py, oracle.py
