"""The tests mirror the package's folders; what several use is in `tests/fixtures`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
