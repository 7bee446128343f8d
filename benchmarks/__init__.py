"""Benchmarks of drivesim. `python -m benchmarks.NAME` runs the module NAME."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
