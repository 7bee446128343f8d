"""Speed and durability, measured: one module per question, `python -m benchmarks.NAME`."""

from driving_sim.engine.memory import keep_freed_memory

keep_freed_memory()  # as `drivesim` does
