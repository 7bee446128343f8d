"""Speed and durability, measured: one module per question, `python -m benchmarks.NAME`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
