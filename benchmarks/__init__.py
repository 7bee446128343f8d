"""Speed and durability, measured: one module per question, `python -m benchmarks.NAME`."""
