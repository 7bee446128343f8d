"""Benchmarks of drivesim, one module for each: `python -m benchmarks.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
