"""What the benchmarks share: paired timing, the machine, the models' shapes, the peers."""
