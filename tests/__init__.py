"""Tests, in folders that mirror those of the package. `tests/fixtures` contains shared code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
