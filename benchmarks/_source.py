"""Importing this makes the source tree's package and its tests' helpers importable, installed or not."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]
